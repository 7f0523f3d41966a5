"""One sweep for the tests, run in this process. What its runs train does not matter: a script stands in."""

import subprocess

import pytest
from sweeps import GRID, STAND_IN

from experiment.sweep import main


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd):
    """sweep("--flag", RHOS="0.1") does a sweep in this process; returns exit code, output and errors."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("SEEDS", "0")
    monkeypatch.setenv("FATES", "{}")

    def run(*arguments, grid=GRID, **settings):
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            capfd.readouterr()
            try:
                code = main(["scripts/sweep_test.sh", str(tmp_path), *arguments], grid, program)
            except SystemExit as stopped:
                code = stopped.code
            out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    run.output, run.program = tmp_path / "out", program
    return run
