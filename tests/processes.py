"""Runs of main_prune_train.py in processes of their own, for tests.

They are forks of this process, which spares them the imports: those take longer than a run. Once this process has had a run
of its own, nothing is left to import.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from main_prune_train import main

FORKS = [  # for pytestmark: this process can fork, and has had a run
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork"),
    pytest.mark.usefixtures("trained"),
]


def forks(test: Callable) -> Callable:
    """Decorate one test as FORKS does all of a module."""
    for mark in FORKS:
        test = mark(test)
    return test


class Child:
    """A run in a forked process.

    Args:
        flags: without --output-dir.
        directory: of the run.
        name: of the files `name.out` and `name.err` beside the directory, with what it prints.
        environment: variables to set.
        around: a context, such as before_step, that the run takes place in.
    """

    def __init__(
        self,
        flags: str,
        directory: Path,
        name: str | None = None,
        environment: dict[str, str] | None = None,
        around: AbstractContextManager | None = None,
    ):
        self.directory, self._argv = directory, ["--output-dir", str(directory), *flags.split()]
        self._out, self._err = (directory.with_name(f"{name or directory.name}.{kind}") for kind in ("out", "err"))
        self._environment, self._around = environment or {}, around or nullcontext()
        self._out.touch()
        self._err.touch()
        self._process = multiprocessing.get_context("fork").Process(target=self._run)
        self._process.start()
        self.pid = self._process.pid
        atexit.register(self._process.kill)  # in case that a test fails and leaves it running

    def _run(self) -> None:
        os.environ.update(self._environment)
        tqdm.set_lock(
            threading.RLock()
        )  # else it is shared with all forks, and never released by one that is killed with it
        for number, path in ((1, self._out), (2, self._err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        with self._around:
            sys.exit(main(self._argv))

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has printed on stderr so far."""
        return self._err.read_text()

    def wait(self, seconds: float = 100) -> int | None:
        """Return its exit code, or None where it still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        while (code := self._process.exitcode) is None and time.monotonic() < deadline:
            time.sleep(0.005)  # its join() would wait for its workers too
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def workers(self) -> list[str]:
        """Return the numbers of its own child processes."""
        return Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()

    def wait_for_checkpoint(self) -> None:
        """Wait until it has written a checkpoint."""
        wait_for(self.directory / "checkpoint.pt", lambda: self.wait(0) is None)


def wait_for(path: Path, runs: Callable[[], bool]) -> None:
    """Wait until a process that runs has written a file."""
    deadline = time.monotonic() + 100
    while not path.exists():
        assert runs()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launch(
    flags: str,
    world: int,
    directory: Path,
    further: Callable[[int], str] = lambda rank: "",
    around: Callable[[int], AbstractContextManager] = lambda rank: nullcontext(),
) -> list[tuple[int, str]]:
    """Run the command line in several processes, as torchrun would: where one of them fails, it kills the others.

    Args:
        flags: of all processes.
        world: the number of processes.
        directory: of the run.
        further: flags of one process, by rank.
        around: a context that one process runs in, by rank.

    Returns:
        Exit code and stderr of each process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    children = []
    for rank in range(world):
        name, environment = f"{directory.name}.{rank}", common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(Child(f"{flags} {further(rank)}", directory, name, environment, around(rank)))
    deadline = time.monotonic() + 120
    while any(child.wait(0.01) is None for child in children):
        if time.monotonic() > deadline or any(child.wait(0) for child in children):
            for child in children:
                if child.wait(1.5) is None:
                    child.kill()
                    child.wait()
    return [(child.wait(), child.err) for child in children]
