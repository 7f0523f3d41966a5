"""The sweep scripts, launched as users launch them; their runs are short stand-ins where what they train does not matter."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Stands in for the Python that a sweep calls: leaves what a run leaves, or fails, as its flags say.
STAND_IN = """#!/usr/bin/env bash
[ "$1" = main_prune_train.py ] || exec PYTHON "$@"
shift
printf '%s\\n' "$CUDA_VISIBLE_DEVICES" >>"$STAND_IN_LOG"
for arg; do
    case $last in
        --output-dir) out=$arg ;;
        --sam-rho) rho=$arg ;;
        --seed) seed=$arg ;;
    esac
    last=$arg
done
mkdir -p "$out"
[ "$rho" != "$POISON" ] || { echo "error: poisoned" >&2; exit 1; }
printf '%s\\0' "$@" >"$out/argv"
sleep "${STAND_IN_SLEEP:-0}"
echo '{}' >"$out/result.json"
"""


class _Terminal:
    """A process on a terminal of its own."""

    def __init__(self, pid):
        self.pid = pid

    def wait(self, timeout):
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise TimeoutError


@pytest.fixture
def sweep(tmp_path):
    """sweep("sweep_rho.sh", "--flag", RHOS="0.1") with a stand-in for training; returns the finished process."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(STAND_IN.replace("PYTHON", shlex.quote(sys.executable)))
    fake.chmod(0o755)

    def run(script, *arguments, wait=True, terminal=False, **settings):
        environment = os.environ | {
            "PATH": f"{fake.parent}:{os.environ['PATH']}", "OUTPUT_DIR": str(tmp_path / "out"), "SEEDS": "0 1",
            "STAND_IN_LOG": str(tmp_path / "log"), "POISON": "none", **settings,
        }  # fmt: skip
        command = ["bash", str(ROOT / "scripts" / script), *arguments]
        if terminal:
            pid, master = pty.fork()
            if pid == 0:
                os.chdir(tmp_path)
                os.execvpe(command[0], command, environment)
            return _Terminal(pid), master
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


def wait_for_a_run(directory):
    until = time.monotonic() + 30
    while not list(directory.glob("*/argv")):
        assert time.monotonic() < until, "no run began"
        time.sleep(0.05)


def commands(process):
    return [shlex.split(line) for line in process.stdout.splitlines() if "main_prune_train.py" in line]


@pytest.mark.parametrize(
    ("script", "arms"),
    [("sweep_rho.sh", 5), ("sweep_v2.sh", 3), ("sweep_adaptive.sh", 10), ("sweep_sam.sh", 25)],
)
def test_a_dry_run_lists_every_run_of_the_grid_once(sweep, script, arms):
    process = sweep(script, "--dry-run", METHODS="random rigl none", SPARSITIES="0.9 0.98", SEEDS="3 4 3")
    listed = commands(process)
    assert process.returncode == 0
    assert process.stdout.splitlines()[-1] == f"{len(listed)} runs"
    assert (
        len(listed) == len({tuple(command) for command in listed}) == arms * 5 * 2
    )  # a dense network has one sparsity
    assert len({command[command.index("--output-dir") + 1] for command in listed}) == len(listed)


def test_settings_and_arguments_stay_what_they_are(sweep):
    """No file names for a star, no octal numbers, no further flags out of one, and an empty one is one."""
    process = sweep("sweep_rho.sh", "--dry-run", "--dataset", "digits", "--remark", "", RHOS="* 0.1", JOBS="08")
    assert process.returncode == 0, process.stderr
    listed = commands(process)
    assert {command[command.index("--sam-rho") + 1] for command in listed} == {"*", "0.1"}
    assert all(command[command.index("--remark") + 1] == "" for command in listed)
    lines = sweep("sweep_rho.sh", "--dry-run", RHOS="0.1\n0.2", SEEDS="0\n1\n2")
    assert len(commands(lines)) == 6
    for arguments, settings in (
        (["--remark", "a\x1f--lr\x1f0.7"], {}),
        ([], {"RHOS": "0.1\x1f--lr\x1f0.7"}),
        ([], {"RHOS": " "}),
    ):
        bad = sweep("sweep_rho.sh", "--dry-run", *arguments, **settings)
        assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)


def test_what_an_earlier_version_began_goes_on(sweep, tmp_path):
    """Its lists of flags had no separator at their end."""
    assert sweep("sweep_v2.sh", POISON="0.05").returncode == 1
    for path in (tmp_path / "out" / ".sweep").glob("*.command"):
        path.write_text(path.read_text().removesuffix("\x1f"))
    assert sweep("sweep_v2.sh").returncode == 0
    assert sweep("sweep_v2.sh", EPOCHS="3").returncode == 2


def test_the_table_of_the_paper_has_864_runs(sweep, tmp_path):
    process = sweep("reproduce_cifar.sh", "--help")
    assert process.returncode == 0
    assert "864 runs" in process.stdout
    script = (ROOT / "scripts" / "reproduce_cifar.sh").read_text()
    listing = script.split('if [ -n "$dry_run" ]')[0].replace('$(dirname "$0")', str(ROOT / "scripts"))
    done = subprocess.run(
        ["bash", "-c", listing, "reproduce_cifar.sh", "--dry-run"], capture_output=True, text=True, cwd=tmp_path
    )
    listed = commands(done)
    assert len(listed) == len({tuple(command) for command in listed}) == 864


def test_every_listed_command_is_one_that_the_program_takes(sweep):
    from experiment import flags as cli

    for script in ("sweep_sam.sh", "sweep_adaptive.sh", "sweep_v2.sh"):
        for command in commands(sweep(script, "--dry-run", "--dataset", "digits", METHODS="random none")):
            args, _ = cli.parse(command[2:])
            assert args.dataset == "digits"


def test_arguments_arrive_unchanged_and_nothing_in_them_is_run(sweep, tmp_path):
    remark = f"two words 'quoted' \"twice\" $(touch {tmp_path}/pwned) `id` ; * \\ \n end"
    process = sweep("sweep_rho.sh", "--remark", remark, RHOS="0.1", OUTPUT_DIR=str(tmp_path / "with space"))
    assert process.returncode == 0, process.stderr
    argv = (tmp_path / "with space" / "random-0.9-samv2-rho0.1-seed1" / "argv").read_text().split("\0")
    assert argv[argv.index("--remark") + 1] == remark
    assert argv[argv.index("--output-dir") + 1] == str(tmp_path / "with space" / "random-0.9-samv2-rho0.1-seed1")
    assert not (tmp_path / "pwned").exists()


def test_a_failing_run_is_listed_and_stops_no_other(sweep, tmp_path):
    process = sweep("sweep_rho.sh", RHOS="0.1 0.2 0.3", POISON="0.2", JOBS="2")
    assert process.returncode == 1
    assert "4 of 6 runs finished, 2 failed" in process.stdout
    assert "failed: random-0.9-samv2-rho0.2-seed0" in process.stderr
    assert "error: poisoned" in process.stderr
    again = sweep("sweep_rho.sh", RHOS="0.1 0.2 0.3")  # mended: only what is left is run
    assert again.returncode == 0
    assert "4 of them finished already" in again.stdout
    assert (tmp_path / "log").read_text().count("\n") == 8


def test_runs_are_spread_over_the_gpus(sweep, tmp_path):
    assert sweep("sweep_rho.sh", RHOS="0.1 0.2", JOBS="4", GPUS="2 5", STAND_IN_SLEEP="1").returncode == 0
    assert sorted((tmp_path / "log").read_text().split()) == ["2", "2", "5", "5"]


def test_interrupted_it_ends_its_runs_and_goes_on_when_launched_again(sweep, tmp_path):
    process = sweep("sweep_rho.sh", RHOS="0.1 0.2", JOBS="2", STAND_IN_SLEEP="30", wait=False)
    wait_for_a_run(tmp_path / "out")
    second = sweep("sweep_rho.sh", RHOS="0.1 0.2")
    assert second.returncode == 2
    assert "a sweep is at work" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "launch again" in err
    again = sweep("sweep_rho.sh", RHOS="0.1 0.2")  # the lock is free: nothing runs on
    assert again.returncode == 0
    assert "4 of 4 runs finished, 0 failed" in again.stdout


def test_other_flags_for_the_same_directory_are_refused(sweep):
    assert sweep("sweep_rho.sh", RHOS="0.1").returncode == 0
    other = sweep("sweep_rho.sh", "--lr", "0.2", RHOS="0.1")
    assert other.returncode == 2
    assert "other flags" in other.stderr


def test_ctrl_c_on_a_terminal_ends_the_runs(sweep, tmp_path):
    process, terminal = sweep("sweep_rho.sh", RHOS="0.1", STAND_IN_SLEEP="30", terminal=True)
    wait_for_a_run(tmp_path / "out")
    os.write(terminal, b"\x03")
    assert process.wait(timeout=20) == 130
    assert sweep("sweep_rho.sh", RHOS="0.1").returncode == 0  # nothing of it runs on


def test_after_a_wrong_flag_the_right_one_is_taken(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".sweep").mkdir()
    (tmp_path / "out" / ".sweep" / "random-0.9-samv2-rho0.1-seed0.command").write_text(
        "of a run that made no directory"
    )
    assert sweep("sweep_rho.sh", RHOS="0.1").returncode == 0


@pytest.mark.parametrize(
    "flags", [["--seed", "3"], ["--sam-rho=1"], ["--output-dir", "x"], ["--epochs", "2"], ["--sparsity-config=f.yaml"]]
)
def test_what_the_sweep_sets_cannot_be_set_beside_it(sweep, flags):
    process = sweep("sweep_rho.sh", "--dry-run", *flags)
    assert process.returncode == 2
    assert flags[0].split("=")[0] in process.stderr


@pytest.mark.parametrize("flags", [["--sam-v2"], ["--weight-decay", "0", "--sam-v2"]])
def test_what_arms_differ_in_is_not_for_all_of_them(sweep, flags):
    process = sweep("sweep_v2.sh", "--dry-run", *flags)
    assert process.returncode == 2
    assert process.stderr.startswith("error: --sam-v2 is what an arm of this sweep sets")
    assert len(process.stderr.splitlines()) == 1


def test_paths_are_the_callers(sweep, tmp_path):
    (command, *_) = commands(sweep("sweep_rho.sh", "--dry-run", "--data-dir", "images", "--pretrained=a=b.pt"))
    assert command[command.index("--data-dir") + 1] == str(tmp_path / "images")
    assert f"--pretrained={tmp_path / 'a=b.pt'}" in command


@pytest.mark.parametrize("settings", [{"JOBS": "0"}, {"JOBS": "two"}, {"SEEDS": "0 x"}, {"EPOCHS": "1.5"}])
def test_bad_settings_end_in_a_sentence(sweep, settings):
    process = sweep("sweep_rho.sh", **settings)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert len(process.stderr.splitlines()) == 1


def test_a_real_sweep_ends_in_a_table(tmp_path):
    environment = os.environ | {
        "SEEDS": "0 1", "EPOCHS": "2", "RHOS": "0.05", "JOBS": "2", "OUTPUT_DIR": str(tmp_path / "out"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    flags = "--dataset digits --depth 8 --width 0.25 --batch-size 256 --compile off".split()
    command = ["bash", str(ROOT / "scripts" / "sweep_v2.sh"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = [sys.executable, "-m", "analysis.summarize", str(tmp_path / "out")]
    done = subprocess.run(summary, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "6 runs: 6 finished." in done.stdout
    accuracy = [
        json.loads(p.read_text())["test_top1"] for p in sorted((tmp_path / "out").glob("*-sgd-seed*/result.json"))
    ]
    assert f"{sum(accuracy) / 2:.2f} ± " in done.stdout
