"""Errors that the user can mend: a program prints them as one sentence, without a traceback."""

import contextlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UsageError(Exception):
    """Bad input. The message is one sentence that says what to do; exit code 2."""


class TrainingError(Exception):
    """A run that cannot go on. The message is one sentence; exit code 1."""


class DamagedError(UsageError):
    """A checkpoint that does not exist, is not whole, or is of another program."""


class Preempted(BaseException):
    """A run that was told to end and can be launched again. The message is one sentence; exit code 75 (EX_TEMPFAIL).

    It is no Exception: a signal may raise it anywhere, and nothing that handles errors is to take it for one.
    """


@contextmanager
def run_errors() -> Iterator[None]:
    """Turn what is not the program's fault into TrainingErrors: a full disk, a vanished directory, a dead worker."""
    try:
        try:
            yield
        except BrokenPipeError:  # of the output, not of files
            raise
        except ConnectionError as error:  # of a worker
            raise _dead_worker() from error
        except OSError as error:
            place = f"'{error.filename}' " if error.filename else ""
            raise TrainingError(
                f"cannot read or write {place}any more ({error.strerror or error}): mend that and go on by --resume auto; what "
                "was written before is intact"
            ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch raises it wherever the parent is when it learns of it
            raise
        raise _dead_worker() from error


def _dead_worker() -> TrainingError:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(
            signal.SIGCHLD, signal.SIG_DFL
        )  # torch's handler would raise once more while the sentence is printed
    return TrainingError("a data worker died, perhaps out of memory: go on by --resume auto, with fewer --workers")


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into a TrainingError that says what to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"out of GPU memory: try {advice}") from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the ValueErrors by which sam, prune and models refuse their arguments into UsageErrors."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
