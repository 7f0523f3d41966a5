"""One command line for the tests, run in this process."""

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

# Before torch is imported, and for child processes too: on cores that others use, threads wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import sklearn.datasets
import torch
from running import DIGITS, FINISHED

from main_prune_train import main

# Before anything compiles. torch.compile pretends that there is a GPU; autograd, where it begins after that, starts a thread
# for it, and then refuses to work in forked processes. What this program forks in earnest comes before either.
torch.zeros((), requires_grad=True).backward()

sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)  # parsing text: a tenth of a short run

# A shell that launches tests in the background has them, and all that they launch, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Outcome:
    """Exit code, output and, where there is one, the directory of a run."""

    def __init__(self, code, out, err, directory):
        self.code, self.out, self.err, self.directory = code, out, err, directory

    def json(self, name):
        return json.loads((self.directory / name).read_text())

    def checkpoint(self, name="checkpoint.pt"):
        return torch.load(self.directory / name, weights_only=True)

    def files(self):
        """Return the content of its directory's files by name."""
        return {path.name: path.read_bytes() for path in self.directory.iterdir() if path.is_file()}


@pytest.fixture(scope="session")
def run_once(tmp_path_factory):
    """run_once("--flag value ...") is like `train`, for fixtures of several tests that read a run and do not change it."""

    def run(flags: str) -> Outcome:
        directory = tmp_path_factory.mktemp("run_once") / "run"
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main([*DIGITS.split(), *flags.split(), "--output-dir", str(directory)])
        assert code == 0, err.getvalue()
        return Outcome(code, out.getvalue(), err.getvalue(), directory)

    return run


@pytest.fixture(scope="session")
def trained(run_once):
    """A finished run of FINISHED. Tests read it and do not change it."""
    return run_once(FINISHED)


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of `trained`, where `train(FINISHED)` would write, for a test to change."""
    return Outcome(0, trained.out, trained.err, shutil.copytree(trained.directory, tmp_path / "run"))


@pytest.fixture
def unfinished(finished):
    """The same as if it had been ended after its last epoch, before the result."""
    (finished.directory / "result.json").unlink()
    return finished


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train("--flag value ...") runs main_prune_train.py with DIGITS and these flags, in a directory of its own.

    `short=False` leaves DIGITS out, `output=None` the directory.
    """
    monkeypatch.chdir(tmp_path)

    def run(flags: str, output: str | None = "run", short: bool = True) -> Outcome:
        argv = flags.split()
        if short:
            argv = DIGITS.split() + argv
        if output:
            argv += ["--output-dir", str(tmp_path / output)]
        code = main(argv)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, Path(tmp_path / (output or "")))

    return run


@pytest.fixture
def machine(monkeypatch):
    """machine(processor, capability, compiler) makes this one look like another: words of /proc/cpuinfo, GPU, C++ compiler."""

    def look(processor: str = "GenuineIntel", capability: tuple[int, int] = (8, 0), compiler: str = "true") -> None:
        monkeypatch.setattr(Path, "read_text", lambda path: processor)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
        monkeypatch.setenv("CXX", compiler)

    return look


def pytest_terminal_summary(terminalreporter):
    """Print what tests have counted, from whichever process they ran in."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
                terminalreporter.write_line(f"{name}: {value}")
