"""Ending a run when it is told to, at a step's end and with a checkpoint, and writing checkpoints in time."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.errors import UsageError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def blocked() -> Iterator[None]:
    """Hold signals back, in this thread and in what it starts meanwhile; they come after this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interruption:
    """Notes SIGTERM, SIGINT and SIGUSR1 while it is entered, so that the step at hand can finish.

    A second signal does what it would have done without this. Works in the main thread; elsewhere signals stay as they are.

    Attributes:
        signal: the name of what came, or None.
    """

    def __init__(self):
        self.signal: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        try:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self.__exit__()


class CheckpointSchedule:
    """When a checkpoint is due: after so many epochs, or so many minutes since the last one.

    Args:
        text: `3` for epochs, `10m` for minutes.

    Raises:
        UsageError: neither.
    """

    def __init__(self, text: str):
        minutes = text.endswith("m")
        try:
            value = float(text[:-1]) if minutes else int(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise UsageError(f"--checkpoint-every takes epochs, as 5, or minutes, as 10m, not '{text}'")
        self._epochs, self._seconds = (None, 60 * value) if minutes else (value, None)
        self._last = time.monotonic()

    def due_in_epoch(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def due_after_epoch(self, epoch: int) -> bool:
        return self.due_in_epoch() if self._epochs is None else epoch % self._epochs == 0

    def saved(self) -> None:
        self._last = time.monotonic()
