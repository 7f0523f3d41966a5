"""What all commands of analysis/ do alike when something is missing, and how they show progress."""

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.command import make_room_for, progress, throttled
from analysis.text_table import mean_and_std_text, text_table
from utils.errors import UsageError

ROOT = Path(__file__).parent.parent.parent

COMMANDS = """
import sys, tempfile
from analysis import export, loss_surface, robustness, sharpness, summarize
for name in ("pandas", "matplotlib", "tabulate", "jinja2", "safetensors", "zstandard"):
    sys.modules[name] = None
for command in (summarize, loss_surface, robustness, export, sharpness):
    print(command.main(["missing"]), file=sys.stderr)
del sys.modules["matplotlib"]
tempfile.tempdir = "/proc/none"
print(loss_surface.main(["missing"]), file=sys.stderr)
"""


def test_a_missing_package_or_cache_is_one_sentence_where_it_is_needed():
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/proc/none", "MPLCONFIGDIR": "/proc/none"}
    command = [sys.executable, "-c", COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stderr.splitlines() == [
        "error: pandas, tabulate, jinja2 not installed: pip install -r requirements-analysis.txt", "2",
        "error: matplotlib not installed: pip install -r requirements-analysis.txt", "2",
        "error: matplotlib not installed: pip install -r requirements-analysis.txt", "2",
        "error: safetensors, zstandard not installed: pip install -r requirements-export.txt", "2",
        "error: there is no checkpoint 'missing'", "2",  # sharpness needs none of them
        "error: matplotlib cannot write to a cache directory: set MPLCONFIGDIR to a directory that can be written to", "2",
    ]  # fmt: skip


def test_a_command_may_be_launched_twice_and_replaces_no_other_kind_of_file(tmp_path):
    for name in ("figures.json", "figures", "rho0.05"):
        for _ in range(2):
            make_room_for(tmp_path / name)
            (tmp_path / name).touch()
    for name in ("checkpoint.pt", "model.bin"):
        with pytest.raises(UsageError, match="does not end in .json, as what is written there should"):
            make_room_for(tmp_path / name)


def test_progress_in_a_log_is_a_line_at_the_start_at_the_end_and_now_and_then(capsys):
    with progress(3, "points", seconds=60) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err.splitlines() == ["0 of 3 points, 0 s", "3 of 3 points, 0 s"]
    with progress(3, "points", seconds=0) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err.count("\n") == 4
    shown = []
    show = throttled(shown.append, seconds=60)
    show("first, ", "network")
    show("second")
    assert shown == ["first, network"]


def test_a_table_that_is_too_wide_continues_below():
    rows = [{"": str(number)} | {f"column {c}": "1.5" for c in range(6)} for number in (1, 12)]
    lines = text_table(rows, width=40).splitlines()
    assert lines[:3] == [
        "    column 0  column 1  column 2", "1        1.5       1.5       1.5", "12       1.5       1.5       1.5",
    ]  # fmt: skip
    assert lines[3] == ""
    assert lines[4].split() == ["column", "3", "column", "4", "column", "5"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1400.0, 1600.0], "1500 ± 141"),
        ([0.30, 0.31], "0.3050 ± 0.0071"),
        ([1e-9, 3e-9], "2e-09 ± 1.4e-09"),
        ([5.0, 5.0], "5 ± 0"),
        ([5.0, None], "-"),
    ],
)
def test_a_mean_has_the_digits_that_its_deviation_leaves(values, text):
    assert mean_and_std_text(values) == text
