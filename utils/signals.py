"""Ending a run when it is told to, at a step's end and with a checkpoint, and writing checkpoints in time."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.errors import Preempted, UsageError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEATED = 1.0  # seconds after which a signal is another one


@contextmanager
def blocked() -> Iterator[None]:
    """Hold signals back, in this thread and in what it starts meanwhile; they come after this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interruption:
    """What SIGTERM, SIGINT and SIGUSR1 do while this is entered: end the run by Preempted.

    They do so at once, but for inside `finishing`, where they are noted so that the step at hand can end and be saved. A
    second signal, a second later or more, does what it would have done without this. Under torchrun a second signal is
    ignored: torchrun passes on what its processes may have had already, and kills after 30 seconds. Works in the main
    thread; elsewhere signals stay as they are.

    Attributes:
        signal: the name of what came, or None.
    """

    def __init__(self):
        self.signal: str | None = None
        self._came = 0.0
        self._finishing = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        with contextlib.suppress(ValueError):  # not the main thread
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Around what looks at `signal` from time to time and ends by itself."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._came = signal.Signals(number).name, time.monotonic()
            if not self._finishing:
                raise Preempted(f"ended by {self.signal}: go on by --resume auto")
        elif time.monotonic() - self._came >= REPEATED and "TORCHELASTIC_RUN_ID" not in os.environ:
            self.__exit__()
            signal.raise_signal(number)


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
