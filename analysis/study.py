"""Train what a study lacks, and add every finished run to the ledger: python -m analysis.study NAME DIRECTORY [ARGUMENT ...].

scripts/study.sh and scripts/study_gpu.sh launch it. NAME is that of the script and of a list in experiment/study_list.py,
relative paths start from DIRECTORY, and the arguments are the script's.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean

from analysis.labels import count_text
from analysis.ledger import (
    ROOT,
    Ledger,
    differing_flags,
    git,
    mathematics,
    measured_at_the_end,
    read_run,
    same_mathematics,
)
from experiment.flags import NOT_OF_FIGURES, flag, number, parse
from experiment.grid import absolute_paths, refuse, refuse_foreign, refuse_misspelt
from experiment.study_list import MEASURED, STUDIES, TASKS, TUNING_SEEDS, Run, tuning
from experiment.sweep import IMPORTED_BY_RUNS, PROGRAM, Sweep
from training.checkpoint import BEST, NEWEST, PREVIOUS
from utils.errors import UsageError
from utils.files import write_text_atomically

IN_ENVIRONMENT = ("JOBS", "GPUS", "DATA_DIR", "EPOCHS", "OUTPUT_DIR", "STUDY")
JOBS = {"study": "2", "study_gpu": "3"}  # an H100 trains three runs at a time as fast, in all, as eight
# Folders whose code a launch has in memory.
IN_MEMORY = ("analysis", "experiment", "imagedata", "models", "prune", "training", "utils")
RESULTS = "results"  # folder of ledgers: of the checkout, or of a trial's OUTPUT_DIR
CHOSEN = "chosen"  # folder of a ledger, with the values that were chosen
SETTINGS = """
settings, in the environment:
  JOBS        runs at a time ({jobs})
  GPUS        numbers of the GPUs to spread runs over; each run sees all where it is not set
  DATA_DIR    folder with CIFAR-10 as images, train/<class>/* and test/<class>/*; without it the paper's tasks download
              CIFAR-10, and others on it are left out
  EPOCHS      another length, for a trial: its figures go to OUTPUT_DIR/results, not to the ledger
  OUTPUT_DIR  where the directories of the runs are (of this checkout runs/STUDY, of a trial runs/STUDY_trial)
  STUDY       the list to train: study or study_gpu ({name})

Further flags go to main_prune_train.py. One that changes figures makes it a trial too."""


@dataclass
class Study(Sweep):
    """A sweep whose list of runs follows from what the ledger has.

    Attributes:
        plan: all runs in their order; values that are yet to be chosen are None.
        results: the ledger.
        images: flags that say where a task's images are, by the task's kind of images.
        extra: further flags of every run.
        root: of the checkout; None for a trial, which may be of any.
    """

    plan: list[Run] = field(default_factory=list)
    results: Path = Path("results")
    images: dict[str, list[str]] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    root: Path | None = ROOT
    writes: bool = False

    def __post_init__(self):
        self.ledgers = {task: Ledger(self.results / task, self.root) for task in {run.task: 0 for run in self.plan}}
        self.chosen: dict[tuple[str, str], float | None] = {}
        self.broken: set[str] = set()  # in this launch
        self.stopped = False  # since the checkout changed
        self.began_with = mathematics("HEAD", self.root, *IN_MEMORY) if self.root else ""

    def file(self, run: str, kind: str) -> Path:
        """Return the path of a file about a run: its command, log, or mark of failure."""
        directory = self.output / run
        return directory.parent / ".sweep" / f"{directory.name}.{kind}"

    def finished(self, run: str) -> bool:
        """Return whether the ledger has a run."""
        task, _, name = run.partition("/")
        return name in self.ledgers[task].entries

    def flags(self, run: str) -> list[str]:
        """Return all flags of a run."""
        return [*self.runs[run], "--checkpoint-every", "2m", "--output-dir", str(self.output / run), "--resume", "auto"]

    def complete(self, run: Run) -> list[str] | None:
        """Return the flags that decide a run, or None where a run before it has to end first."""
        if run.tuned_arm and not run.tuning:
            value = self.chosen.get((run.task, run.tuned_arm))
            if value is None:
                return None
            run = run.with_value(value)
        flags = run.flags()
        if needed := self.needed(run):
            if not (self.finished(f"{run.task}/{needed.parent.name}") and needed.exists()):
                return None
            flags = [str(needed) if word.startswith("{") else word for word in flags]
        return [*flags, *self.images[TASKS[run.task].images], *self.extra, *self.own_epochs(run)]

    def needed(self, run: Run) -> Path | None:
        """Return the checkpoint of another run that a run begins from; None for one that needs none."""
        names = [word.strip("{}") for word in run.flags() if word.startswith("{")]
        return self.output / run.task / names[0] / NEWEST if names else None

    def own_epochs(self, run: Run) -> list[str]:
        """Return the length of an arm that is to train longer or shorter than others, where a trial has a length of its own."""
        args, given = parse(self.extra)
        length = TASKS[run.task].arms[run.arm].length
        return ["--epochs", str(max(1, round(length * args.epochs)))] if "epochs" in given and length != 1 else []

    def missing(self) -> list[tuple[Run, list[str] | None]]:
        """List the runs that the ledger lacks, with their flags as far as they are known."""
        self.choose_values()
        return [
            (run, self.complete(run))
            for run in self.plan
            if not self.finished(f"{run.task}/{run.name}") and not self.without_value(run)
        ]

    def without_value(self, run: Run) -> bool:
        """Return whether every value of a run's arm diverged, so that there is none to train it with."""
        return not run.tuning and self.chosen.get((run.task, run.tuned_arm), 0.0) is None

    def choose_values(self) -> None:
        """Choose the value of every arm whose tuning is in the ledger, and keep it in a file if this study writes."""
        for task, arm in dict.fromkeys((run.task, run.tuned_arm) for run in self.plan if run.tuned_arm):
            path = self.results / task / CHOSEN / f"{arm}.json"
            if (task, arm) in self.chosen and (path.exists() or not self.writes):
                continue
            best = self.best(task, arm)
            if path.exists():
                chosen = read_choice(path)
                check_choice(path, chosen, TASKS[task].arms[arm].values, best)
                self.chosen[task, arm] = chosen["value"]
            elif best:
                self.chosen[task, arm] = best["value"]
                if self.writes:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text_atomically(path, json.dumps(best) + "\n")

    def best(self, task: str, arm: str) -> dict | None:
        """Return what `best_value` makes of an arm's tuning, or None where the ledger has not all of it."""
        entries, values = self.ledgers[task].entries, TASKS[task].arms[arm].values
        trials = [run for run in tuning(task, (arm,)) if run.name in entries]
        return best_value(trials, entries) if len(trials) == len(TUNING_SEEDS) * len(values) else None

    def next_run(self, left: list[str], running: set[str]) -> str | None:
        """Return the first run that is missing and can start now."""
        for run, flags in self.missing():
            key = f"{run.task}/{run.name}"
            if flags is not None and key not in running | self.broken:
                if self.moved():
                    return None
                self.runs[key] = flags
                self.begin(key)
                return key
        return None

    def moved(self) -> bool:
        """Return whether the checkout is no longer what this process began with, and say so once."""
        if self.stopped or not self.root:
            return self.stopped
        self.stopped = dirty(self.root) or mathematics("HEAD", self.root, *IN_MEMORY) != self.began_with
        if self.stopped:
            print(
                "error: files of the checkout were changed meanwhile, and no more runs are started: commit what is not committed, "
                "and launch again",
                file=sys.stderr,
            )
        return self.stopped

    def begin(self, run: str) -> None:
        """Make room for a run: what a run of other flags or of another commit's mathematics left is deleted."""
        directory, command = self.output / run, self.file(run, "command")
        command.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            try:
                if json.loads(command.read_text()) != self.runs[run]:
                    raise UsageError("it was begun with other flags")
                about = json.loads((directory / "args.json").read_text())
                if self.root:
                    for commit in (*about.get("earlier_git", ()), about["git"]):
                        same_mathematics(commit, self.root, "it")
                if not any((directory / name).exists() for name in (NEWEST, PREVIOUS)):
                    raise UsageError("it left no checkpoint to go on from")
            except (OSError, ValueError, KeyError, UsageError) as error:
                print(f"note: {run} begins anew ({error})", file=sys.stderr)
                shutil.rmtree(directory)
        write_text_atomically(command, json.dumps(self.runs[run]))

    def train_here(self, run: str) -> None:
        """Train a run in this process, and measure its sharpness where that is wanted; it raises SystemExit."""
        try:
            super().train_here(run)
        except SystemExit as ended:
            if ended.code or not self.measured(run):
                raise
        from analysis import sharpness

        directory, args = self.output / run, parse(self.extra)[0]
        device = ["--device", "cpu" if args.no_cuda else args.device]
        if not measured_at_the_end(directory):
            sys.exit(sharpness.main([str(directory / NEWEST), *MEASURED.split(), *device]))

    def measured(self, run: str) -> bool:
        """Return whether the sharpness of a run is measured."""
        planned = next(each for each in self.plan if f"{each.task}/{each.name}" == run)
        return not planned.tuning and planned.arm in TASKS[planned.task].measured

    def settle(self, run: str, code: int) -> bool:
        """Add a run that ended to the ledger, and return whether it has failed instead."""
        task, directory = run.partition("/")[0], self.output / run
        if code == -signal.SIGTERM:  # told to end where it had nothing to save
            return False
        try:
            diverged = code == 1 and (directory / "args.json").exists() and not (directory / "result.json").exists()
            if code == 0 or diverged:
                ledger = self.ledgers[task]
                ledger.write(ledger.check(read_run(directory)))
                if not any(f"{{{directory.name}}}" in " ".join(cell.split()) for cell in TASKS[task].cells.values()):
                    for name in (NEWEST, PREVIOUS, BEST):
                        (directory / name).unlink(missing_ok=True)
                return False
        except UsageError as error:
            if code == 0:
                print(f"error: {error}", file=sys.stderr)
        if super().settle(run, code or 1):
            self.broken.add(run)
            return True
        return False

    def report(self) -> int:
        """Print how far the study is and which runs failed; return how many of them."""
        left = Counter(run.task for run, _ in self.missing())
        self.show_failed(sorted(self.broken))
        for task, ledger in self.ledgers.items():
            print(f"{task}: {len(ledger.entries)} runs in {ledger.folder}, {left[task]} missing")
        return len(self.broken)

    def report_waiting(self) -> int:
        """Print why runs could not begin, and what mends that; return how many of them."""
        waiting = [self.why_waiting(run) for run, flags in self.missing() if flags is None]
        for reason, count in Counter(waiting).items():
            print(f"not begun: {count_text(count, 'run')}; {reason}", file=sys.stderr)
        return len(waiting)

    def why_waiting(self, run: Run) -> str:
        """Return why a run cannot begin, and what mends that."""
        if run.tuned_arm and not run.tuning and self.chosen.get((run.task, run.tuned_arm)) is None:
            return f"the value of '{run.tuned_arm}' is not chosen: train {run.task}/tune-*-{run.tuned_arm}-* first"
        needed = self.needed(run)
        assert needed is not None
        other = f"{run.task}/{needed.parent.name}"
        if not self.finished(other):
            return f"train {other} first"
        return f"'{needed}' is not there: bring it, or remove '{self.results / other}.json' to train that run again"


def best_value(trials: list[Run], entries: dict[str, dict]) -> dict:
    """Choose the value with the best mean accuracy on held-out images after the last epoch; one that diverged is out.

    Returns:
        `value` (None if all diverged; the smaller one of equals), and `held_out` by value (None where a run diverged).
    """
    means: dict[float, float | None] = {}
    right: dict[float, int] = {}  # images, since the digits that accuracies have here do not tell equals
    images = TASKS[trials[0].task].val_split if trials else 0
    for value in dict.fromkeys(run.value for run in trials):
        assert value is not None
        tried = [entries[run.name] for run in trials if run.value == value]
        means[value] = None
        if all(entry["state"] == "finished" for entry in tried):
            accuracies = [entry["epochs"]["val_top1"][-1] for entry in tried]
            means[value] = round(mean(accuracies), 3)
            right[value] = sum(round(accuracy * images / 100) for accuracy in accuracies)
    return {
        "value": max(right, key=lambda value: (right[value], -abs(value)), default=None),
        "held_out": {f"{value:g}": accuracy for value, accuracy in means.items()},
    }


def read_choice(path: Path) -> dict:
    """Return what a file has that `best_value` was written to. Raises UsageError where it has no value."""
    try:
        chosen = json.loads(path.read_text())
        chosen["value"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"cannot read '{path}' ({error}): restore it from git, or remove it to choose again"
        ) from error
    return chosen


def check_choice(path: Path, chosen: dict, values: tuple[float, ...], best: dict | None) -> None:
    """Note that a file was chosen from other values than there are now.

    Args:
        path: of the file.
        chosen: what it has.
        values: to choose from now.
        best: what `best_value` makes of the ledger's runs now, where all are there.

    Raises:
        UsageError: from these values the ledger's runs say another one.
    """
    tried = chosen.get("held_out", {}).keys()
    if tried and tried != {f"{value:g}" for value in values}:
        print(
            f"note: '{path}' was chosen from other values than experiment/study_list.py has: remove it to choose again",
            file=sys.stderr,
        )
    elif best and chosen["value"] != best["value"]:
        raise UsageError(
            f"'{path}' has {chosen['value']}, and the runs in the ledger say {best['value']}: remove it to choose again, and the "
            "runs that were trained with it"
        )


def dirty(root: Path) -> bool:
    """Return whether files of a checkout differ from its commit; new files do not count."""
    return bool(git(root, "status", "--porcelain", "--untracked-files=no"))


def build_parser(name: str) -> argparse.ArgumentParser:
    """Build the parser of a study's script."""
    parser = argparse.ArgumentParser(
        prog=f"bash scripts/{name}.sh",
        description="Train what the study lacks, and add every finished run to results/. Launched again it goes on.",
        epilog=SETTINGS.format(name=name, jobs=JOBS[name]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=number(float, above=0), default=math.inf, metavar="M",
        help="start no run after M minutes, and end those at work with a checkpoint")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN",
        help="only runs whose TASK/NAME matches one, such as 'methods/*' or 'digits-noise/random-0.9-*'")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the missing runs, and how many")
    return parser


def setting(name: str, default: str) -> str:
    """Return a setting from the environment."""
    return os.environ.get(name) or default


def check_ledger(study: Study) -> None:
    """Refuse a ledger whose runs have other flags than the list says. Raises UsageError."""
    for run in study.plan:
        entry, flags = study.ledgers[run.task].entries.get(run.name), study.complete(run)
        if entry is None or (flags is None and study.needed(run)):
            continue
        if flags is None:
            raise UsageError(
                f"'{study.results / run.task / run.name}.json' has a value of '{run.tuned_arm}', of which none is chosen now: train "
                f"'{run.task}/tune-*-{run.tuned_arm}-*' alone first, or restore the choice from git"
            )
        if differing := differing_flags(tuple(flags), entry["flags"]):
            raise UsageError(
                f"'{study.results / run.task / run.name}.json' differs from experiment/study_list.py in {', '.join(differing)}: "
                "remove what the list no longer has from the ledger, or leave it out by --only"
            )


def set_by_study(plan: list[Run]) -> set[str]:
    """Return the names of the flags that tell its runs apart, say where a run goes, or bring others along."""
    names = {"seed", "val_split", "output_dir", "resume", "checkpoint_every", "evaluate", "config"}
    for task, cell, arm in {(run.task, run.cell, run.arm) for run in plan}:
        one = TASKS[task].arms[arm]
        tuned = f"{one.tuned} 0.1" if one.values or one.rho_of or one.rho else ""
        names |= parse(f"{TASKS[task].cells[cell]} {one.flags} {tuned}".split())[1]
    of_tasks = [parse(TASKS[task].flags.split()) for task in dict.fromkeys(run.task for run in plan)]
    for name in set().union(*(given for _, given in of_tasks)) - {"epochs"}:  # a trial may have its own
        if len({str(getattr(args, name)) for args, _ in of_tasks}) > 1:
            names.add(name)
    return names


def prepare(name: str, directory: str, argv: list[str], root: Path, program: Path) -> tuple[Study, Namespace]:
    """Return the study that the command line and the environment ask for.

    Raises:
        UsageError: they contradict each other or the ledger.
    """
    refuse_misspelt(IN_ENVIRONMENT, "study")
    refuse_foreign(IN_ENVIRONMENT, "study")
    parser = build_parser(name)
    args, extra = parser.parse_known_args(argv)
    extra = list(absolute_paths(extra, directory))
    if epochs := setting("EPOCHS", ""):
        extra += ["--epochs", epochs]
    given = parse(extra)[1]
    listed = setting("STUDY", name)
    if listed not in STUDIES:
        raise UsageError(f"STUDY takes {' or '.join(STUDIES)}, not '{listed}'")
    runs = {f"{run.task}/{run.name}": run for run in STUDIES[listed]()}
    for word in args.only:
        if not any(fnmatch(run, word) for run in runs):
            raise UsageError(f"--only {word}: no run of the study has such a TASK/NAME; --dry-run lists them")
    plan = [run for place, run in runs.items() if any(fnmatch(place, word) for word in args.only)]
    for taken in sorted(given & set_by_study(plan)):
        raise UsageError(f"{flag(taken)} is set by the study: leave it out; experiment/study_list.py is its list")
    trial = bool(given - NOT_OF_FIGURES)
    usual = root / "runs" / (f"{listed}_trial" if trial else listed)
    output = Path(os.path.realpath(os.path.join(directory, setting("OUTPUT_DIR", str(usual)))))
    refuse_mixture(output, trial)
    if trial and output == root.resolve():
        raise UsageError(f"OUTPUT_DIR: '{output / RESULTS}' is the ledger of the study: give a trial another directory")
    folder = setting("DATA_DIR", "")
    images = {"": [], "cifar10": ["--dataset", "cifar10"]}
    if folder and not os.path.isdir(os.path.join(directory, folder, "train")):
        raise UsageError(
            f"DATA_DIR: there is no '{os.path.join(directory, folder, 'train')}': name a folder with train and test"
        )
    if folder:
        images["folder"] = images["cifar10"] = ["--dataset", "folder", "--data-dir", os.path.join(directory, folder)]
    if "dataset" in given:
        images = {"": [], "folder": [], "cifar10": []}
    known = [run for run in plan if TASKS[run.task].images in images]
    results = (output if trial else root) / RESULTS
    there = [run for run in plan if (results / run.task / f"{run.name}.json").exists()]
    if left := len({*plan} - {*known, *there}):
        print(
            f"note: {count_text(left, 'run')} left out: DATA_DIR has to name a folder with the images of CIFAR-10",
            file=sys.stderr,
        )
    jobs = setting("JOBS", JOBS[name])
    if not (jobs.isdecimal() and int(jobs)):
        raise UsageError(f"JOBS takes one whole number above 0, not '{jobs}'")
    gpus = setting("GPUS", "")
    if not all(number.isdecimal() for number in gpus.split()):
        raise UsageError(f"GPUS takes whole numbers, such as '0 1', not '{gpus}'")
    study = Study(
        output, {}, int(jobs), gpus.split(), program=program, plan=known, images=images, extra=extra,
        results=results, root=None if trial else root,
    )  # fmt: skip
    return study, args


def refuse_mixture(output: Path, trial: bool) -> None:
    """Refuse a trial where runs of the study lie, and the study where those of a trial do: either deletes other flags' runs."""
    if any((output / task).is_dir() for task in TASKS) and (output / RESULTS).is_dir() != trial:
        other = "the study" if trial else "a trial"
        raise UsageError(f"'{output}' has runs of {other}: give another OUTPUT_DIR")


def main(argv: list[str], root: Path = ROOT, program: Path = PROGRAM) -> int:
    """Run the command line; return the exit code: 0, 1 if a run has failed or cannot begin, 2 for bad input, 130 if a signal came."""
    began = time.monotonic()
    if len(argv) < 2 or argv[0] not in STUDIES or not os.path.isdir(argv[1]):
        refuse("scripts/study.sh and study_gpu.sh launch this: python -m analysis.study NAME DIRECTORY [ARGUMENT ...]")
    name, directory, *arguments = argv
    try:
        study, args = prepare(name, directory, arguments, root, program)
        study.choose_values()
        check_ledger(study)
        if args.dry_run:
            return dry_run(study)
        if study.root and (not study.began_with or dirty(study.root)):
            refuse("the ledger takes runs of a git checkout without changes: commit them, or train in another worktree")
        lock = study.lock()
        study.results.mkdir(exist_ok=True)  # by which the directory of a trial is known
        study.writes = True
    except UsageError as error:
        refuse(str(error))
    for module in IMPORTED_BY_RUNS:  # once, before the forks
        importlib.import_module(module)
    study.runs = {f"{run.task}/{run.name}": [] for run in study.plan if not study.without_value(run)}
    left = [f"{run.task}/{run.name}" for run, _ in study.missing()]
    print(f"{study.output}: {len(study.runs)} runs, {len(study.runs) - len(left)} of them in the ledger", flush=True)
    until = began + 60 * args.minutes
    interrupted = study.train_runs(left, until)
    lock.close()
    failed = study.report()
    if interrupted:
        print("interrupted: launch again to go on", file=sys.stderr)
        return 130
    if not study.stopped and time.monotonic() < until:
        failed += study.report_waiting()
    return 1 if failed or study.stopped else 0


def dry_run(study: Study) -> int:
    """Print the commands of the runs that are missing, and how many there are."""
    missing = study.missing()
    known = {f"{run.task}/{run.name}": flags for run, flags in missing if flags is not None}
    study.runs = known
    if known:
        print(study.commands())
    waiting = len(missing) - len(known)
    print(
        f"{len(known)} runs"
        + (f", and {waiting} that wait for a value to be chosen or for a run before them" if waiting else "")
    )
    return 0


if __name__ == "__main__":
    if {"--dry-run", "--help", "-h"}.intersection(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # head may close the pipe
    sys.exit(main(sys.argv[1:]))
