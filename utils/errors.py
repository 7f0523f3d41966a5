"""Errors that are the user's to mend: the script prints them as one sentence, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Bad input. The message is one sentence that says what to do; exit code 2."""


class TrainingError(Exception):
    """A run that cannot go on. The message is one sentence; exit code 1."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the ValueErrors by which sam, prune and models refuse their arguments into UsageErrors."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
