"""Sweeps at work. What their runs train does not matter except in one test: elsewhere a script stands in."""

import fcntl
import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import GRID, ROOT, SCRIPTS, begun, refused, value

from experiment.flags import parse
from experiment.sweep import main, slurm_job

# running


def test_arguments_arrive_unchanged_and_each_run_has_a_log_of_its_own(sweep, tmp_path):
    remark = f"two words 'quoted' \"twice\" $(touch {tmp_path}/it-ran) `id` ; * \\ \n end"
    done = sweep("--remark", remark, RHOS="0.1", OUTPUT_DIR=str(tmp_path / "with space"), FATES='{"0.1": "fail"}')
    assert (done.returncode, "error: poisoned" in done.stderr) == (1, True)
    (run,) = begun(tmp_path / "with space")
    assert value("--remark", run["argv"]) == remark
    assert (tmp_path / "with space/.sweep/random-0.9-samv2-rho0.1-seed0.log").read_text() == "error: poisoned\n"
    assert not (tmp_path / "it-ran").exists()


def test_a_full_disk_leaves_the_flags_that_a_run_was_begun_with(sweep, monkeypatch):
    assert sweep(RHOS="0.1").returncode == 0
    (file,) = sweep.output.glob(".sweep/*.command")
    begun_with = file.read_text()
    (directory,) = sweep.output.glob("*-seed0")
    directory.rename(directory.with_name("moved"))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    done = sweep("--remark", "other", RHOS="0.1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot write to" in done.stderr
    assert file.read_text() == begun_with


def test_a_run_that_fails_or_crashes_is_listed_and_stops_no_other(sweep):
    done = sweep(RHOS="0.1 0.2 0.3", JOBS="2", SEEDS="0 1", FATES='{"0.1": "kill", "0.2": "fail"}')
    assert done.returncode == 1
    assert "2 of 6 runs finished, 4 failed" in done.stdout
    assert "failed: random-0.9-samv2-rho0.2-seed1" in done.stderr
    assert "error: poisoned" in done.stderr
    assert "ended by SIGKILL" in done.stderr
    assert len(list(sweep.output.glob(".sweep/*.failed"))) == 4


def test_launched_again_a_sweep_does_what_is_left(sweep):
    assert sweep(SEEDS="0 1", FATES='{"0.2": "fail"}').returncode == 1
    for path in sweep.output.glob("*/begun.json"):
        path.unlink()
    again = sweep(SEEDS="0 1")
    assert again.returncode == 0
    assert "4 runs, 2 of them finished already" in again.stdout
    assert [value("--sam-rho", run["argv"]) for run in begun(sweep.output)] == ["0.2", "0.2"]
    assert not list(sweep.output.glob(".sweep/*.failed"))


@pytest.mark.parametrize("torn", ["", "{", "null"])
def test_a_run_whose_result_is_torn_is_not_finished(sweep, torn):
    assert sweep(RHOS="0.1").returncode == 0
    (path,) = sweep.output.glob("*/result.json")
    path.write_text(torn)
    again = sweep(RHOS="0.1")
    assert again.returncode == 0
    assert "1 runs, 0 of them finished already" in again.stdout
    assert path.read_text() == "{}"


def test_a_run_that_fails_in_a_measurement_after_its_training_is_tried_again(sweep):
    done = sweep(FATES='{"0.2": "measure"}')
    assert done.returncode == 1
    assert "1 of 2 runs finished, 1 failed" in done.stdout
    assert "1 of 2 runs finished" in sweep(FATES='{"0.2": "preempt"}').stdout  # while it measures
    again = sweep()
    assert again.returncode == 0
    assert "2 runs, 1 of them finished already" in again.stdout
    assert "2 of 2 runs finished, 0 failed" in again.stdout


def test_other_flags_for_a_run_that_was_begun_are_refused(sweep):
    sweep(RHOS="0.1", FATES='{"0.1": "fail"}')
    other = sweep("--lr", "0.2", RHOS="0.1")
    assert refused(other)
    assert "begun with other flags: give another OUTPUT_DIR" in other.stderr
    (sweep.output / "random-0.9-samv2-rho0.1-seed0" / "begun.json").unlink()
    (sweep.output / "random-0.9-samv2-rho0.1-seed0").rmdir()
    assert sweep("--lr", "0.2", RHOS="0.1").returncode == 0  # it left nothing


def test_a_file_of_flags_that_changed_between_launches_is_refused(sweep, tmp_path):
    file, flags = tmp_path / "args.json", {"dataset": "digits", "lr": 0.2}
    file.write_text(json.dumps({"args": flags}))
    assert sweep("--config", "args.json", RHOS="0.1").returncode == 0
    (run,) = begun(sweep.output)
    assert parse(run["argv"])[0].lr == 0.2  # whatever becomes of the file
    file.write_text(json.dumps({"args": flags | {"lr": 0.02}}))
    other = sweep("--config", "args.json", RHOS="0.1", SEEDS="0 1")
    assert refused(other)
    assert "begun with other flags: give another OUTPUT_DIR" in other.stderr
    assert len(begun(sweep.output)) == 1


@pytest.mark.parametrize("end", ["", "\x1f"])
def test_sweeps_of_the_earlier_runner_go_on(sweep, end):
    """It separated flags by 0x1f, and at first did not end them by it."""
    sweep(RHOS="0.1", FATES='{"0.1": "fail"}')
    (path,) = sweep.output.glob(".sweep/*.command")
    path.write_text("\x1f".join(json.loads(path.read_text())) + end)
    assert sweep(RHOS="0.1", EPOCHS="3").returncode == 2
    assert sweep(RHOS="0.1").returncode == 0


def test_runs_go_several_at_a_time_and_share_gpus_and_cores(sweep, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    done = sweep(SEEDS="0 1", JOBS="4", GPUS="2 5", FATES='{"0.1": "meet", "0.2": "meet"}')
    assert done.returncode == 0
    assert sorted(run["CUDA_VISIBLE_DEVICES"] for run in begun(sweep.output)) == ["2", "2", "5", "5"]
    cores = len(os.sched_getaffinity(0))
    assert {run["OMP_NUM_THREADS"] for run in begun(sweep.output)} == {str(max(1, cores // 4))}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_runs_with_a_checkpoint_and_the_sweep_goes_on_later(sweep, name):
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # nohup has tests ignore SIGHUP
    done = sweep(FATES=json.dumps({"0.1": name}))
    signal.signal(getattr(signal, name), before)
    assert done.returncode == 130
    assert done.stderr == "interrupted: launch again to go on\n"
    assert [path.parent.name for path in sweep.output.glob("*/checkpoint.pt")] == ["random-0.9-samv2-rho0.1-seed0"]
    assert len(begun(sweep.output)) == 1  # no other was started
    again = sweep()
    assert again.returncode == 0
    assert "2 of 2 runs finished, 0 failed" in again.stdout


def test_ctrl_c_on_a_terminal_ends_runs_and_the_progress_line_is_in_place(sweep, monkeypatch):
    pid, terminal = pty.fork()
    if pid == 0:
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "w" if number else "r") for number in range(3))
        os.environ["FATES"] = '{"0.1": "Ctrl-C"}'
        os._exit(main(["sweep_test.sh", "/", "--remark", "on a terminal"], GRID, sweep.program))
    shown, typed = b"", False
    while chunk := read(terminal):
        shown += chunk
        if not typed and list(sweep.output.glob("*/ready")):
            typed = bool(os.write(terminal, b"\x03"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert b"\r0 done, 1 running, 0 failed of 2\x1b[K" in shown
    assert b"interrupted: launch again to go on" in shown
    assert len(list(sweep.output.glob("*/checkpoint.pt"))) == 1


def read(terminal):
    try:
        return os.read(terminal, 1000)
    except OSError:  # nobody is left on it
        return b""


def test_two_sweeps_do_not_work_in_one_directory(sweep):
    (sweep.output / ".sweep").mkdir(parents=True)
    with open(sweep.output / ".sweep" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = sweep()
    assert refused(second)
    assert "a sweep is at work" in second.stderr
    assert sweep().returncode == 0


def test_the_runs_of_a_sweep_that_is_killed_keep_others_out_until_they_end(sweep):
    os.environ["FATES"] = '{"0.1": "orphan"}'
    arguments = (["sweep_test.sh", "/"], GRID, sweep.program)
    killed = multiprocessing.get_context("fork").Process(target=main, args=arguments)
    killed.start()
    killed.join()
    assert killed.exitcode == -9
    assert "a sweep is at work" in sweep().stderr
    directory = sweep.output / "random-0.9-samv2-rho0.1-seed0"
    (directory / "go").touch()
    with open(sweep.output / ".sweep" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the run
    assert (directory / "result.json").exists()
    assert "2 runs, 1 of them finished already" in sweep().stdout


def test_a_directory_that_cannot_be_written_is_refused(sweep, tmp_path):
    (tmp_path / "file").touch()
    assert refused(sweep(OUTPUT_DIR=str(tmp_path / "file" / "out")))


def test_commands_of_the_grid_run_at_the_end_without_a_shell(sweep):
    write = "import sys; open(sys.argv[1] + '/page', 'w').write(sys.argv[2])"
    grid = f'{GRID}\n> python -c "{write}" {{OUTPUT_DIR}} "$(id); *"\n> cp {{OUTPUT_DIR}}/page {{OUTPUT_DIR}}/copy'
    assert sweep(grid=grid, FATES='{"0.1": "fail", "0.2": "fail"}').returncode == 1
    assert not (sweep.output / "copy").exists()
    assert sweep(grid=grid, FATES='{"0.1": "fail", "0.2": "measure"}').returncode == 1  # the training is there to show
    assert (sweep.output / "copy").read_text() == "$(id); *"


# Slurm


@pytest.fixture
def submitted(sweep, tmp_path, monkeypatch):
    """submitted(*flags, **settings) submits to an sbatch that writes down what it was given; returns that."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"$0.arguments"\ncat >"$0.script"\necho "$SWEEP_LEFT" >"$0.left"\nenv >"$0.env"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "")

    def submit(*flags, **settings):
        done = sweep("--slurm", *flags, **settings)
        assert done.returncode == 0, done.stderr
        return [Path(f"{sbatch}.{name}").read_text() for name in ("arguments", "script", "left", "env")]

    return submit


def job(left, number, program=None):
    """The exit code of one job of the array."""
    os.environ["SLURM_ARRAY_TASK_ID"] = number
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(slurm_job(Path(left.strip()), program))
    )
    process.start()
    process.join()
    return process.exitcode


def test_slurm_gets_an_array_of_the_runs_that_are_left(sweep, submitted, tmp_path, monkeypatch):
    sweep(RHOS="0.1")
    arguments, script, left, _ = submitted(RHOS="0.1 0.2 0.3", JOBS="5")
    assert {"--array=0-1%5", "--requeue", "--export=ALL", "--job-name=sweep_test"} <= set(arguments.split("\n"))
    environment = {"SWEEP_PYTHON": "echo", "SWEEP_LEFT": "$(touch it-ran) a"}
    called = subprocess.run(
        ["sh"], input=script, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert called.stdout == "-m experiment.sweep --slurm-job $(touch it-ran) a\n"
    assert not (tmp_path / "it-ran").exists()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("FATES", '{"0.3": "fail"}')
    assert [job(left, number, sweep.program) for number in ("0", "1")] == [0, 1]
    assert [(value("--sam-rho", run["argv"]), run["OMP_NUM_THREADS"]) for run in begun(sweep.output)] == [
        ("0.1", "1"), ("0.2", "3"), ("0.3", "3"),
    ]  # fmt: skip
    assert [path.stem for path in sweep.output.glob(".sweep/*.failed")] == ["random-0.9-samv2-rho0.3-seed0"]


def test_jobs_take_the_threads_that_are_set_and_none_from_the_machine_that_submits(submitted, sweep, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    left, inherited = submitted(RHOS="0.1 0.2")[2:]
    assert "OMP_NUM_THREADS" not in inherited
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert job(left, "0", sweep.program) == 0
    assert [run["OMP_NUM_THREADS"] for run in begun(sweep.output)] == ["2"]


def test_a_directory_of_images_may_be_one_that_jobs_alone_have(sweep, submitted):
    flags = ("--dataset", "folder", "--data-dir", "of-the-node", "--image-size", "32")
    assert refused(sweep(*flags))
    left = submitted(*flags)[2]
    assert "of-the-node" in Path(left.strip()).read_text()


def test_a_run_of_an_array_that_was_submitted_twice_is_finished(sweep, submitted, monkeypatch):
    monkeypatch.setenv("FATES", '{"0.1": "twice"}')
    assert job(submitted(RHOS="0.1")[2], "0", sweep.program) == 0
    assert not list(sweep.output.glob(".sweep/*.failed"))


@pytest.mark.parametrize("number", ["", "2", "-1", "x[$(touch it-ran)]"])
def test_a_slurm_job_without_a_run_is_refused(submitted, capfd, number):
    assert job(submitted()[2], number) == 2
    assert capfd.readouterr().err.startswith("error: SLURM_ARRAY_TASK_ID")


def test_without_slurm_there_is_nothing_to_submit_to(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(sweep("--slurm"))


@pytest.mark.parametrize("arguments", [[], ["--dataset", "digits"]])
def test_the_slurm_script_wants_the_script_of_a_sweep_first(arguments):
    command = ["bash", str(ROOT / "scripts" / "sweep_slurm.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert refused(done)


# the scripts


def test_all_sweep_scripts_launch_their_grid_alike():
    assert len(SCRIPTS) == 5
    texts = [(ROOT / "scripts" / name).read_text().replace(" requirements-analysis.txt", "") for name in SCRIPTS]
    assert len({text.split("<<'GRID'")[0] for text in texts}) == 1


def test_a_real_sweep_trains_and_no_shell_reads_a_flag_as_code(tmp_path):
    evil = "$(touch it-ran);`touch it-ran`'\"& touch it-ran"
    settings = {"SEEDS": "0", "EPOCHS": "1", "JOBS": "2", "OUTPUT_DIR": "out"}
    environment = os.environ | settings | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    flags = "--dataset digits --depth 8 --width 0.25 --batch-size 256 --compile off --remark".split()
    command = ["bash", str(ROOT / "scripts" / "sweep_v2.sh"), *flags, evil]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs finished, 0 failed" in done.stdout
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/result.json")]
    assert sorted(result["args"]["optmzr"] for result in results) == ["sgd", "sgd-sam", "sgd-sam"]
    assert {result["args"]["remark"] for result in results} == {evil}
    assert not list(ROOT.glob("it-ran")) + list(tmp_path.rglob("it-ran"))
