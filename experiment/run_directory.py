"""Which run the flags mean: its name, its directory, and the checkpoint it goes on from."""

import argparse
import fcntl
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple, TextIO

from experiment.flags import check, flag, parse, refuse_impossible, resolve
from prune import METHODS
from training.checkpoint import NEWEST, PREVIOUS, load_checkpoint, load_newest
from training.optim import OPTIMIZERS
from utils.errors import DamagedError, Preempted, UsageError

# Flags that may differ when a run is resumed, and do not name it: they do not touch the mathematics.
FREE = {
    "data_dir",
    "test_batch_size",
    "device",
    "no_cuda",
    "output_dir",
    "remark",
    "resume",
    "evaluate",
    "log_interval",
    "summary",
    "workers",
    "recalibrate_bn",
    "sharpness",
    "checkpoint_every",
    "nonfinite",  # this one does, where a run without it would have ended
}

# Flags that may differ between the processes of a run.
OWN = {"data_dir", "output_dir", "device", "no_cuda", "workers", "remark", "resume", "pretrained", "sparsity_config"}

# Flags whose `auto` is resolved when a run begins; resumed, it means what the run began with.
RESOLVED = ("precision", "compile")


def plain(args: argparse.Namespace) -> dict:
    """The flags as values that JSON and a checkpoint can hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in sorted(vars(args).items())}


class Located(NamedTuple):
    """A run that is to begin or to go on.

    Attributes:
        args: its flags, complete.
        directory: where it is, or will be.
        checkpoint: what it goes on from, if anything.
        damaged: the newest checkpoint, where that is not the one it goes on from.
        found: what was in the directory before any of it was read, see `_look`.
    """

    args: argparse.Namespace
    directory: Path
    checkpoint: dict | None
    damaged: Path | None
    found: dict


def locate_run(args: argparse.Namespace, given: set[str]) -> Located:
    """Check and complete the flags; find the run's directory and the checkpoint it goes on from, if any.

    Raises:
        UsageError: flags that contradict each other or the checkpoint's.
    """
    checkpoint, source, found = None, None, {}
    if args.resume not in (None, "auto"):
        newest = Path(args.resume)
        found = _look(newest.parent)
        checkpoint, source = load_newest(newest)
        directory = newest.parent
        if newest.name not in (NEWEST, PREVIOUS, "best.pt"):
            raise UsageError(
                f"--resume goes on from the checkpoint.pt or best.pt of a run's directory, not '{args.resume}'"
            )
        if "output_dir" in given and args.output_dir.resolve() != directory.resolve():
            raise UsageError(
                f"--resume {args.resume} goes on in that checkpoint's own directory: leave --output-dir out"
            )
        args = _resumed(args, given, checkpoint["args"])
    check(args, given)
    args = resolve(args)
    if args.resume in (None, "auto"):
        directory = args.output_dir or Path("runs") / run_name(args)
        newest = directory / NEWEST
        found = _look(directory)
        if args.resume and {NEWEST, PREVIOUS} & found.keys():
            checkpoint, source = load_newest(newest)
            # The command is that of the run: what it leaves out is meant to have its default.
            args = _resumed(args, set(vars(args)), checkpoint["args"])
    _refuse_taken(directory, args.resume, checkpoint, found)
    damaged = directory / NEWEST if source and NEWEST in found and not _is_whole(directory / NEWEST, source) else None
    return Located(args, directory, checkpoint, damaged, found)


def _is_whole(newest: Path, source: Path) -> bool:
    """Whether the newest checkpoint is: as the one that a run goes on from, or as one beside it."""
    if source.name == NEWEST:
        return True
    try:
        load_checkpoint(newest)
    except DamagedError:
        return False
    return True


def claim_directory(run: Located, keep_result: bool = False) -> TextIO:
    """Make the directory of a run and make sure that it can be written to; a result that is to change is gone.

    A damaged checkpoint makes room, so that the one before it stays until there is a new one; what killed processes have
    left half-written is removed.

    Args:
        keep_result: until a new one takes its place: of a finished run that is only looked at more closely.

    Returns:
        An open file: as long as it is, no other process can claim the directory. Forked workers do not hold it.

    Raises:
        UsageError: it cannot be written to, or another process trains in it.
        Preempted: another process has trained in it since the run was located.
    """
    directory = run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _look(directory) != run.found:
            raise Preempted(f"another process has written to '{directory}' while this one began: launch this one again")
        if run.damaged and run.damaged.exists():
            run.damaged.replace(directory / "damaged.pt")
        if not keep_result:
            (directory / "result.json").unlink(missing_ok=True)
        for unfinished in directory.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
    except (BlockingIOError, PermissionError) as error:  # a lock that is held raises either
        if error.filename:
            raise UsageError(f"cannot write to '{directory}' ({error.strerror}): name another --output-dir") from error
        raise UsageError(
            f"another process trains in '{directory}': wait for it, or name another --output-dir"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot write to '{directory}' ({error.strerror}): name another --output-dir") from error
    return lock


def read_result(directory: Path) -> dict:
    """A run's result.json, or nothing where there is none."""
    try:
        return json.loads((directory / "result.json").read_text())
    except (OSError, ValueError):
        return {}


def _refuse_taken(directory: Path, resume: str | None, checkpoint: dict | None, found: dict) -> None:
    """Refuse a directory whose files a run would overwrite."""
    taken = list(found)
    if not taken or checkpoint or (resume and taken == ["args.json"]):  # that one began and did not finish an epoch
        return
    if resume:
        raise UsageError(
            f"'{directory}' has a {taken[0]} but no checkpoint.pt to go on from: name another --output-dir"
        )
    kind = "a finished" if "result.json" in taken else "a started"
    raise UsageError(
        f"'{directory}' holds {kind} run: go on with it by --resume auto, or name another place by --output-dir or --remark"
    )


def _look(directory: Path) -> dict[str, tuple]:
    """Which files of a run are in a directory, each with what tells one version of it from the next."""
    found = {}
    for name in ("result.json", NEWEST, PREVIOUS, "best.pt", "metrics.csv", "args.json"):
        try:
            status = os.stat(directory / name)
            found[name] = (status.st_ino, status.st_mtime_ns, status.st_size)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise UsageError(f"cannot look into '{directory}' ({reason}): name another --output-dir") from error
    return found


def _resumed(args: argparse.Namespace, given: set[str], saved: dict) -> argparse.Namespace:
    """The flags of a checkpoint, with those given now in their place where they may differ.

    Raises:
        UsageError: a flag that changes the mathematics differs.
    """
    refuse_impossible(saved)
    now, saved = plain(args), vars(parse([])[0]) | saved  # a flag that came after the checkpoint had its default
    given = given - {name for name in RESOLVED if now[name] == "auto"}
    differing = sorted(name for name in given - FREE if now[name] != saved.get(name))
    if differing == ["epochs"] and now["epochs"] > saved["epochs"] and _may_grow(saved):
        differing = []
    if differing:
        changes = ", ".join(f"{flag(name)} was {saved.get(name)} and is {now[name]}" for name in differing)
        hint = " (--epochs may grow with --lr-scheduler constant and masks that stay)" if "epochs" in differing else ""
        raise UsageError(f"a resumed run cannot change its mathematics: {changes}{hint}")
    return _merge(args, given, saved)


def _may_grow(saved: dict) -> bool:
    """Whether nothing in a run depends on how long it is."""
    method = METHODS[saved["prune_method"]]
    return saved["lr_scheduler"] == "constant" and not method.update and not method.tickets


def evaluated(args: argparse.Namespace, given: set[str], saved: dict) -> argparse.Namespace:
    """The flags of a checkpoint for evaluating it, with those given now in their place.

    Raises:
        UsageError: another network than the checkpoint's, or a flag that is for training.
    """
    refuse_impossible(saved)
    network = ("arch", "depth", "width")
    data = {
        "dataset",
        "data_dir",
        "image_size",
        "test_batch_size",
        "device",
        "no_cuda",
        "deterministic",
        "evaluate",
        "precision",
        "recalibrate_bn",
    }
    for name in sorted(given - data - set(network)):
        raise UsageError(f"{flag(name)} has no effect with --evaluate: leave it out")
    for name in network:
        if name in given and getattr(args, name) != saved[name]:
            raise UsageError(
                f"the checkpoint is of another network: its {flag(name)} is {saved[name]}, not {getattr(args, name)}; "
                "leave the network's flags out"
            )
    if "dataset" in given:
        saved = saved | {"data_dir": None, "image_size": None}
    merged = _merge(args, given | {"recalibrate_bn", "sharpness"}, saved)
    check(merged, given & data)
    return merged


def _merge(args: argparse.Namespace, given: set[str], saved: dict) -> argparse.Namespace:
    merged = vars(args) | {name: value for name, value in saved.items() if name not in given}
    for name in ("data_dir", "sparsity_config", "pretrained"):
        if merged[name]:
            merged[name] = Path(merged[name])
    for name in ("resume", "evaluate", "output_dir", "device", "no_cuda"):  # of this command, not of the first
        merged[name] = getattr(args, name)
    return argparse.Namespace(**merged)


def run_name(args: argparse.Namespace) -> str:
    """A name from the hyper-parameters: the telling ones always, any other one where it is not the default."""
    kind = OPTIMIZERS[args.optmzr]
    dataset = f"folder-{args.data_dir.resolve().name}" if args.dataset == "folder" and args.data_dir else args.dataset
    optimizer = args.optmzr
    if kind.sam:
        optimizer += f"{'-v2' if args.sam_v2 else ''}{'-adaptive' if args.adaptive else ''}-rho{args.sam_rho:g}"
    sparse = "dense"
    if args.prune_method != "none":
        known = [args.prune_method, args.sparsity_distribution, args.sparsity and f"{args.sparsity:g}"]
        if args.sparsity_config:
            known.append(args.sparsity_config.stem)
        if args.sparsity_pattern != "unstructured":
            known.append(args.sparsity_pattern.replace(":", "of"))
        sparse = "-".join(filter(None, known))
    told = {"arch", "depth", "dataset", "optmzr", "sam_v2", "adaptive", "sam_rho", "prune_method", "sparsity",
            "sparsity_distribution", "sparsity_config", "sparsity_pattern", "lr", "epochs", "seed", "mixup"}  # fmt: skip
    parts = [f"{args.arch}{args.depth}", dataset, optimizer, sparse, f"lr{args.lr:g}"]
    parts += [] if _may_grow(vars(args)) else [f"epochs{args.epochs}"]
    unchanged = vars(parse([])[0]) | {name: getattr(args, name) for name in ("arch", "optmzr", "mixup", "prune_method")}
    unchanged = vars(resolve(argparse.Namespace(**unchanged)))
    for name, value in plain(args).items():
        if name not in told | FREE and value != unchanged[name]:
            parts.append(name.replace("_", "-") + _shown(value))
    if args.mixup:
        parts.append("mixup")
    parts.append(f"seed{args.seed}")
    if args.remark:
        parts.append(args.remark)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)).strip(".-")
    if len(name) > 200:  # file systems take 255
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _shown(value: object) -> str:
    if value is True:
        return ""
    if isinstance(value, list):
        return "-" + "-".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
