"""The directory of a run: which one the flags mean, its lock, and the checkpoint that the run goes on from."""

import argparse
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from experiment.checks import check, resumed_flags
from experiment.flags import resolve
from experiment.run_name import run_name
from training.checkpoint import BEST, NEWEST, PREVIOUS, load_checkpoint, load_newest
from utils.distributed import launched
from utils.errors import DamagedError, UsageError

LOCK, RESULT = ".lock", "result.json"
BEFORE_CHECKPOINT = {"metrics.csv", "args.json"}  # all that a run leaves that was killed before its first checkpoint
FILES = (RESULT, NEWEST, PREVIOUS, BEST, *sorted(BEFORE_CHECKPOINT, reverse=True))


@dataclass
class Located:
    """A run that is to begin or to go on.

    Attributes:
        args: its flags, complete.
        directory: where it is, or will be.
        checkpoint: what it goes on from, if anything.
        damaged: the newest checkpoint, where that is not the one it goes on from.
    """

    args: argparse.Namespace
    directory: Path
    checkpoint: dict | None
    damaged: Path | None

    def read_result(self) -> dict:
        """Return what result.json holds, or nothing where there is none."""
        try:
            return json.loads((self.directory / RESULT).read_text())
        except (OSError, ValueError):
            return {}

    def prepare(self, keep_result: bool = False) -> None:
        """Make room for what the run will write.

        A damaged checkpoint is moved aside, so that the one before it stays until there is a new one. What killed
        processes left half-written is removed, and a result that is to change.

        Args:
            keep_result: until a new one takes its place: of a finished run that is only measured further.
        """
        if self.damaged and self.damaged.exists():
            self.damaged.replace(self.directory / "damaged.pt")
        if not keep_result:
            (self.directory / RESULT).unlink(missing_ok=True)
        for unfinished in self.directory.glob(".*.tmp"):
            unfinished.unlink(missing_ok=True)


@contextmanager
def locate_run(args: argparse.Namespace, given: set[str]) -> Iterator[Located]:
    """Check and complete the flags, lock the run's directory, and find the checkpoint that it goes on from, if any.

    Raises:
        UsageError: flags that contradict each other or the checkpoint's, or a directory that is not to be had.
    """
    resume = Path(args.resume) if args.resume not in (None, "auto") else None
    if resume:
        if resume.is_dir():
            resume /= NEWEST
        directory = resume.parent
        if not os.path.exists(resume):
            raise UsageError(f"there is no checkpoint '{resume}'")
        if resume.name not in (NEWEST, PREVIOUS, BEST):
            raise UsageError(
                f"--resume goes on from the checkpoint.pt, previous.pt or best.pt of a run's directory, not '{args.resume}'"
            )
        if "output_dir" in given and args.output_dir.resolve() != directory.resolve():
            raise UsageError(
                f"--resume {args.resume} goes on in that checkpoint's own directory: leave --output-dir out"
            )
    else:
        check(args, given)
        args = resolve(args)
        directory = args.output_dir or Path("runs") / run_name(args)
    with _locked(directory):
        found = [name for name in FILES if (directory / name).exists()]
        checkpoint, source = None, None
        if resume:
            checkpoint, source = load_newest(resume)
            args = resumed_flags(args, given, checkpoint["args"])
            check(args, given)
            args = resolve(args)
        elif args.resume and {NEWEST, PREVIOUS} & set(found):
            checkpoint, source = load_newest(directory / NEWEST)
            # The command is that of the run: what it leaves out is meant to have its default.
            args = resumed_flags(args, set(vars(args)), checkpoint["args"])
        elif found and not (args.resume and set(found) <= {*BEFORE_CHECKPOINT, BEST}):  # best.pt is written first
            raise UsageError(_taken(directory, args.resume, found))
        newest = directory / NEWEST
        damaged = newest if source and NEWEST in found and not _is_whole(newest, source) else None
        yield Located(args, directory, checkpoint, damaged)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a run's directory, made where there is none. It goes again if nothing is written into it.

    Of several processes the first one holds it for all. Forked workers do not hold it.

    Raises:
        UsageError: it cannot be written to, or another process trains in it.
    """
    if launched("WORLD_SIZE", 1) > 1 and launched("RANK", 0) != 0:
        yield
        return
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        with _lock(directory):
            yield
    finally:
        with suppress(OSError):  # a directory that holds anything else stays
            if made and os.listdir(directory) == [LOCK]:
                (directory / LOCK).unlink()
            for path in made:
                path.rmdir()


def _lock(directory: Path) -> TextIO:
    """Return an open file: as long as it is open, no other process can lock the directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES) and error.filename is None:  # the lock is held
            raise UsageError(
                f"another process trains in '{directory}': wait for it, or name another --output-dir"
            ) from error
        way = "cannot write to" if error.filename else "cannot lock"
        raise UsageError(f"{way} '{directory}' ({error.strerror}): name another --output-dir") from error
    return file


def _is_whole(newest: Path, source: Path) -> bool:
    """Return whether the newest checkpoint is whole, which the one that a run goes on from is known to be."""
    if source.name == NEWEST:
        return True
    try:
        load_checkpoint(newest)
    except DamagedError:
        return False
    return True


def _taken(directory: Path, resume: str | None, found: list[str]) -> str:
    """Return the sentence that refuses a directory whose files a run would overwrite."""
    if resume:
        return f"'{directory}' has a {found[0]} but no checkpoint.pt to go on from: name another --output-dir"
    kind = "a finished" if RESULT in found else "a started"
    return f"'{directory}' holds {kind} run: go on with it by --resume auto, or name another place by --output-dir or --remark"
