"""Errors that are the user's to mend: the script prints them as one sentence, without a traceback."""

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
    """A checkpoint that is not there, not whole, or of another program."""


class Preempted(BaseException):
    """A run that is to be launched again, as it was told to end. The message is one sentence; exit code 75 (EX_TEMPFAIL).

    A signal may raise it anywhere, so that nothing that handles errors takes it for one.
    """


@contextmanager
def run_errors() -> Iterator[None]:
    """Turn into TrainingErrors what is not the program's fault: a full disk, a directory that is gone, a dead worker."""
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
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch would raise again, in the middle of what is said
    return TrainingError("a data worker died, perhaps out of memory: go on by --resume auto, with fewer --workers")


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn into a TrainingError, with what to try, that a GPU is out of memory."""
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
