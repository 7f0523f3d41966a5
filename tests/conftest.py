"""One command line for the tests, run in this process."""

import json
import os
import signal
from pathlib import Path

# Before torch is imported, and for child processes too: on cores that others use, threads wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from main_prune_train import main

# A shell that launches tests in the background has them, and all that they launch, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


SMALL = "--dataset digits --depth 8 --width 0.5 --batch-size 256 --log-interval 2".split()


class Outcome:
    """Exit code, output and, where there is one, the directory of a run."""

    def __init__(self, code, out, err, directory):
        self.code, self.out, self.err, self.directory = code, out, err, directory

    def json(self, name):
        return json.loads((self.directory / name).read_text())

    def checkpoint(self, name="checkpoint.pt"):
        return torch.load(self.directory / name, weights_only=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of one-step SAM with masks. Tests read it and do not change it."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    flags = "--epochs 2 --optmzr sgd-sam --sam-v2 --prune-method random --sparsity 0.5"
    assert main([*SMALL, *flags.split(), "--output-dir", str(directory)]) == 0
    return Outcome(0, "", "", directory)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train("--flag value ...") runs main_prune_train.py on digits, in a directory of its own, depth 8."""
    monkeypatch.chdir(tmp_path)

    def run(flags: str, output: str | None = "run", short: bool = True) -> Outcome:
        argv = flags.split()
        if short:
            argv = SMALL + argv
        if output:
            argv += ["--output-dir", str(tmp_path / output)]
        code = main(argv)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, Path(tmp_path / (output or "")))

    return run


def pytest_terminal_summary(terminalreporter):
    """Print what tests have counted, from whichever process they ran in."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
                terminalreporter.write_line(f"{name}: {value}")
