"""What signals do to a run: it ends after the step at hand, with a checkpoint."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEATED = 1.0  # seconds after which a signal is another one


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold signals back, in this thread and in processes that it starts, until the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interruption:
    """A context in which SIGTERM, SIGINT and SIGUSR1 raise Preempted.

    Inside `finishing` they are only noted, so that the step at hand can end and be saved. A second signal, a second later
    or more, does what it would have done without this context. Under torchrun a second signal is ignored: torchrun passes
    on what its processes may have had already, and kills after 30 seconds. Works in the main thread; elsewhere signals
    stay as they are.

    Attributes:
        signal: the name of the signal that came, or None.
    """

    def __init__(self):
        self.signal: str | None = None
        self._came = 0.0
        self._finishing = False
        self._before: dict[signal.Signals, Any] = {}

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
        """Only note signals: the block looks at `signal` from time to time and ends by itself."""
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
