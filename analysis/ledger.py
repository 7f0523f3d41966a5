"""Keep the figures of runs in results/.

add writes results/STUDY/RUN.json for each run: flags, figures of every epoch and of the end, commit, device.
render makes the tables and pictures of RESULTS.md, README.md and docs/one-step.md from it.
"""

import argparse
import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Container
from functools import cache
from itertools import compress
from pathlib import Path

from analysis.command import run_command, writing_to
from analysis.labels import count_text
from experiment.flags import NOT_OF_FIGURES, PATHS, RESOLVED, parse, plain, resolve
from experiment.study_list import MEASURED_IMAGES
from training.checkpoint import NEWEST
from utils.errors import UsageError
from utils.files import write_text_atomically

ROOT = Path(__file__).parents[1]
MOST_BYTES = 6000
# Files and folders by which the figures of a run are decided.
MATHEMATICS = (
    "sam.py", "main_prune_train.py", "prune", "training", "models", "imagedata", "experiment/build.py", "experiment/trained_run.py",
    "utils/precision.py", "utils/cuda_graph.py", "utils/distributed.py", "analysis/hessian.py", "analysis/landscape.py",
)  # fmt: skip
FINAL = (
    "test_top1", "test_loss", "best_test_top1", "best_epoch", "sparsity", "ever_alive", "parameters", "nonzero_parameters",
    "inference_flops", "training_flops", "dense_training_flops", "passes_per_step", "skipped_steps",
    "test_top1_recalibrated_bn",
)  # fmt: skip
CURVES = ("train_loss", "train_top1", "val_loss", "val_top1", "test_loss", "test_top1")
DIVERGED = re.compile(
    r"error: ((?:the \w*\s?loss is|the weights are no longer finite|no step of an epoch had).*?step [\d,]+)"
)
# Of the same run at another time or place.
VOLATILE = ("run", "commit", "mathematics", "device", "torch", "seconds")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="write the figures of finished runs into results/")
    adding.add_argument("--study", required=True, metavar="NAME", help="folder of results/")
    adding.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="directory of a finished run")
    adding.set_defaults(run=add_runs)
    rendering = commands.add_parser("render", help="fill the tables and pictures of the pages")
    rendering.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    rendering.set_defaults(run=render)
    for command in (adding, rendering):
        command.add_argument("--results", type=Path, metavar="DIR", help="the ledger (results/)")
    return parser


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line on a checkout and return its exit code."""
    args = build_parser().parse_args(argv)
    args.root, args.results, args.exit_code = root, args.results or root / "results", 0
    return run_command(args.run, args) or args.exit_code


def add_runs(args: Namespace) -> None:
    """Add runs to the ledger, all of them or none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.study):
        raise UsageError(f"--study names a folder of results/, and '{args.study}' is no name for one")
    ledger = Ledger(args.results / args.study, args.root)
    known = Ledger(ledger.folder, args.root)  # what is there, and the runs of this command
    entries = []
    for directory in args.runs:
        entries.append(known.check(read_run(directory)))
        known.entries[entries[-1]["run"]] = entries[-1]
    for entry in entries:
        ledger.write(entry)
    print(f"{count_text(len(entries), 'run')} in {ledger.folder}")


def render(args: Namespace) -> None:
    """Bring the pages up to date, or say which ones are not."""
    from analysis.results_page import render

    changed = render(args.root, args.results, args.check)
    if args.check and changed:
        print(
            f"error: not what the ledger makes: {', '.join(changed)}: run python -m analysis.ledger render",
            file=sys.stderr,
        )
        args.exit_code = 1
    elif not args.check:
        print("\n".join(f"written: {what}" for what in changed) or "nothing to change")


class Ledger:
    """The runs of one study: a folder with a JSON file for each.

    Args:
        folder: of the study.
        root: of the checkout that the runs are to be of; None for a trial, whose runs may be of any.
    """

    def __init__(self, folder: Path, root: Path | None = ROOT):
        self.folder, self.root = folder, root
        self.entries = {path.stem: read_entry(path) for path in sorted(folder.glob("*.json"))}

    def check(self, entry: dict) -> dict:
        """Return an entry with the fingerprint of its mathematics.

        Raises:
            UsageError: a commit that it was trained at is not known, was changed, or computes otherwise than this checkout;
                or the same flags are in the ledger with other figures.
        """
        if self.root:
            for commit in (*entry.get("earlier_commits", ()), entry["commit"]):
                entry = {**entry, "mathematics": same_mathematics(commit, self.root, f"'{entry['run']}'")}
        if len(entry_text(entry).encode()) > MOST_BYTES:
            raise UsageError(f"the figures of '{entry['run']}' do not fit into {MOST_BYTES:,} bytes: shorten its flags")
        for name, other in self.entries.items():
            same_flags = (other["flags"], other["images"]) == (entry["flags"], entry["images"])
            if name == entry["run"] and not same_flags:
                raise UsageError(f"the ledger has another run '{name}' in {self.folder}: rename the run's directory")
            if same_flags and not same_figures(other, entry):
                raise UsageError(
                    f"'{name}' in {self.folder} has the flags of '{entry['run']}' and other figures: which run counts is not "
                    "to be chosen by its figures; delete the file only if that run was wrong"
                )
            if same_flags and name != entry["run"]:
                raise UsageError(
                    f"'{name}' in {self.folder} is the same run as '{entry['run']}': one of them is enough"
                )
        return entry

    def write(self, entry: dict) -> None:
        """Write an entry that was checked, unless it is there with all its figures. Raises UsageError."""
        path = self.folder / f"{entry['run']}.json"
        if entry["run"] not in self.entries and path.exists():  # another process was faster
            self.entries[entry["run"]] = read_entry(path)
            self.check(entry)
        if earlier := self.entries.get(entry["run"]):
            entry = with_later_figures(earlier, entry)
            if entry == earlier:
                return
        with writing_to(self.folder, "--results"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, entry_text(entry))
        self.entries[entry["run"]] = entry


def read_entry(path: Path) -> dict:
    """Read a file of the ledger. Raises UsageError."""
    try:
        entry = json.loads(path.read_text())
        if not (
            entry["run"] == path.stem
            and isinstance(entry["flags"], dict)
            and {*VOLATILE, "state"} <= entry.keys()
            and (entry["state"] == "diverged" or {"test_top1", "passes_per_step"} <= entry["final"].keys())
        ):
            raise ValueError("not a run's figures")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"cannot read '{path}' of the ledger ({error}): restore it from git, or remove it") from error
    return entry


def same_figures(one: dict, other: dict) -> bool:
    """Return whether two entries have the figures of one run, wherever it ran and whatever was measured of it later."""
    epochs = [entry.get("epochs", {}).get("epoch", []) for entry in (one, other)]
    common = set(epochs[0]).intersection(epochs[1])  # curves are thinned by what else there is
    first, second = (
        {
            name: at_epochs(value, common) if name == "epochs" else value
            for name, value in entry.items()
            if name not in (*VOLATILE, "earlier_commits", "sharpness", "final")
        }
        | {name: value for name, value in entry.get("final", {}).items() if name != "test_top1_recalibrated_bn"}
        for entry in (one, other)
    )
    return first == second


def with_later_figures(earlier: dict, entry: dict) -> dict:
    """Return a run's entry as the ledger has it, with what a new entry has beside: figures that were measured since."""
    merged = dict(earlier)
    if "sharpness" in entry:
        merged.setdefault("sharpness", entry["sharpness"])
    if "final" in entry:
        merged["final"] = entry["final"] | earlier["final"]
    return merged


def at_epochs(curves: dict[str, list], wanted: Container[int]) -> dict[str, list]:
    """Return the curves of an entry at some of their epochs."""
    kept = [epoch in wanted for epoch in curves.get("epoch", [])]
    return {name: list(compress(values, kept)) for name, values in curves.items()}


def entry_text(entry: dict) -> str:
    """Return an entry as JSON, a line for each of its parts."""
    parts = (f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in entry.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_run(directory: Path) -> dict:
    """Make the entry of a run that has finished, or has diverged in a sweep.

    Raises:
        UsageError: it is neither, or its files cannot be read.
    """
    name = directory.resolve().name
    try:
        about = json.loads((directory / "args.json").read_text())
        finished = (directory / "result.json").exists()
        result = json.loads((directory / "result.json").read_text()) if finished else {}
        entry = {
            "run": name,
            "state": "finished" if finished else "diverged",
            "commit": about["git"],
            "mathematics": "",
            "device": about["device"],
            "torch": about["versions"]["torch"],
            "seconds": round(result.get("seconds", 0.0), 1),
            "images": about["images"][:16],
            "flags": telling_flags(about["args"]) | ({"processes": n} if (n := about["processes"]) > 1 else {}),
        }
        if "earlier_git" in about:
            entry["earlier_commits"] = about["earlier_git"]
        if result.get("skipped_steps") and about["args"]["precision"] != "fp16":  # maybe before its last launch
            entry["flags"]["nonfinite"] = "skip"
        if not finished:
            entry["end"] = divergence(directory)
            entry["seconds"] = round(sum(float(row["seconds"]) for row in read_epochs(directory)), 1)
            return entry
        entry["final"] = {key: rounded(result[key], 6) for key in FINAL if key in result}
        if measured := measured_at_the_end(directory):
            entry["sharpness"] = sharpness(measured)
        return with_curves(entry, read_epochs(directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"cannot read a run in '{directory}' ({error}): name the directory of a finished run"
        ) from error


def read_epochs(directory: Path) -> list[dict]:
    """Read a run's metrics.csv; a run that ended before its first epoch has none."""
    if not (directory / "metrics.csv").exists():
        return []
    with open(directory / "metrics.csv") as file:
        return list(csv.DictReader(file))


def measured_at_the_end(directory: Path) -> dict:
    """Return what analysis.sharpness wrote of a run as it ended, with an eigenvalue; {} where it wrote nothing of the kind.

    A record of best.pt, of an earlier epoch, of another run, or with batch norm's statistics estimated anew is of another
    network; one on another number of images than the studies take does not compare with theirs.
    """
    file, last = directory / "sharpness.json", read_epochs(directory)[-1:]
    if not (file.exists() and last):
        return {}
    own = telling_flags(json.loads((directory / "args.json").read_text())["args"])
    for record in filter(lambda record: isinstance(record, dict), json.loads(file.read_text())):
        of = Path(record.get("checkpoint", "")).name, record.get("epochs"), record.get("recalibrated_bn")
        if (
            of == (NEWEST, int(last[0]["epoch"]), False)
            and telling_flags(record.get("args", {})) == own
            and record.get("settings", {}).get("images") == MEASURED_IMAGES
            and sharpness(record)
        ):
            return record
    return {}


def divergence(directory: Path) -> str:
    """Return the sentence in which a run of a sweep told that it diverged.

    Raises:
        UsageError: it did not, and so is only unfinished.
    """
    log = directory.resolve().parent / ".sweep" / f"{directory.resolve().name}.log"
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    if not (last and (told := DIVERGED.match(last[0]))):
        raise UsageError(f"the run in '{directory}' has not finished: go on with it by --resume auto")
    return told[1]


def telling_flags(args: dict) -> dict:
    """Return the flags that decide a run's figures and differ from their defaults, sorted by name."""
    plain = vars(parse([])[0])
    args = plain | args  # a flag that came after the run had its default
    if args["stem"] == "auto":  # as it was before there was another one
        args["stem"] = "cifar"
    kind = {name: args[name] for name in ("arch", "optmzr", "mixup", "prune_method", "adaptive", "mest_soft")}
    defaults = vars(resolve(Namespace(**plain | kind))) | {name: plain[name] for name in kind}
    defaults |= {"sam_rho": None, "stem": "cifar"}
    return {
        name: "/".join(Path(value).parts[-2:]) if name in PATHS and value else value
        for name, value in sorted(args.items())
        if name not in NOT_OF_FIGURES and value != defaults.get(name)
    }


@cache
def _planned(flags: tuple[str, ...]) -> tuple[dict, set[str]]:
    """Return the telling flags of a command, and those that depend on the machine."""
    args = plain(resolve(parse(list(flags))[0]))
    return telling_flags(args), {"dataset", "processes", *PATHS, *(name for name in RESOLVED if args[name] == "auto")}


def differing_flags(flags: tuple[str, ...], found: dict) -> list[str]:
    """Return the names in which the flags of an entry differ from those of a command, whatever the machine decides.

    Args:
        flags: the command's; it may end in --seed N.
        found: of the entry.
    """
    head, seed = (flags[:-2], int(flags[-1])) if flags[-2:-1] == ("--seed",) else (flags, 0)
    expected, anywhere = _planned(head)
    expected = expected | ({"seed": seed} if seed else {})
    names = (expected.keys() | found.keys()) - anywhere
    return sorted(name for name in names if expected.get(name) != found.get(name))


def sharpness(measured: dict) -> dict:
    """Return the largest eigenvalue of the Hessian over the living weights, by split."""
    return {
        split: rounded(measured[split]["living"]["eigenvalues"][0]["value"], 4)
        for split in ("train", "test")
        if split in measured and measured[split].get("living", {}).get("eigenvalues")
    }


def with_curves(entry: dict, rows: list[dict]) -> dict:
    """Return an entry with the figures of its epochs: of all, or of as many at equal distances as fit."""
    if not rows:
        raise ValueError("metrics.csv has no epoch")
    # What may be measured later.
    later = {"sharpness": {"train": -0.00012345, "test": -0.00012345}, "test_top1_recalibrated_bn": 98.7654}
    there = entry.keys() | entry["final"].keys()
    room = len(entry_text({name: figure for name, figure in later.items() if name not in there}))
    for stride in range(1, len(rows) + 1):
        kept = rows[(len(rows) - 1) % stride :: stride]  # the last one is among them
        curves = {
            name: [epoch_figure(name, row[name]) for row in kept]
            for name in CURVES
            if name in rows[0] and any(row[name] for row in kept)
        }
        whole = {**entry, "epochs": {"epoch": [int(row["epoch"]) for row in kept], **curves}}
        # The fingerprint of the mathematics is to come.
        if len(entry_text(whole).encode()) <= MOST_BYTES - 40 - room:
            break
    return whole


def epoch_figure(name: str, text: str) -> float | None:
    """Return a figure of an epoch, rounded; None for one that was not measured."""
    if not text:
        return None
    return round(float(text), 2) if name.endswith("top1") else rounded(float(text), 4)


def rounded(value: float, digits: int) -> float:
    """Round to so many significant digits; whole numbers stay as they are."""
    if isinstance(value, int) or not value:
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


def git(root: Path, *arguments: str) -> str:
    """Return what git prints, or "" where it fails."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def mathematics(commit: str, root: Path, *others: str) -> str:
    """Return a fingerprint of the files that decide figures, and of others, at a commit; "" for a commit that is not here."""
    listing = git(root, "ls-tree", "-r", commit, "--", *MATHEMATICS, *others)
    return hashlib.sha256(listing.encode()).hexdigest()[:12] if listing else ""


def same_mathematics(commit: str | None, root: Path, what: str) -> str:
    """Return the fingerprint of the mathematics that a commit shares with the checkout.

    Args:
        commit: as args.json has it.
        root: of the checkout.
        what: the run, for the sentence.

    Raises:
        UsageError: it does not share it, or cannot be known.
    """
    if commit is None:
        raise UsageError(f"{what} was not run in a git checkout, or lost its args.json: run it again in one")
    if commit.endswith("-dirty"):
        raise UsageError(f"{what} was run with changes that are not committed: commit them and run it again")
    found = mathematics(commit, root)
    if not found:
        raise UsageError(f"{what} was run at commit {commit[:12]}, which is not in this repository: fetch it")
    if found != mathematics("HEAD", root):
        changed = git(root, "diff", "--name-only", commit, "HEAD", "--", *MATHEMATICS).split()
        raise UsageError(
            f"{what} was run at commit {commit[:12]}, and files that decide its figures are others now ({', '.join(changed)}): "
            "check that commit out to add it, or run it again"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
