"""Sweeps. What their runs train does not matter except in one test: elsewhere a script that writes a result stands in."""

import fcntl
import itertools
import json
import multiprocessing
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from running import DIGITS

from experiment.config import parse_and_replay
from experiment.flags import parse
from experiment.sweep import main, slurm_job
from models import build_model
from prune.masks import layers_by_position, prunable_weights, select_layers

ROOT = Path(__file__).parents[2]
SCRIPTS = [path.name for path in sorted((ROOT / "scripts").glob("*.sh")) if "experiment.sweep" in path.read_text()]
GRID = """
# A sweep for tests.
RHOS = 0.1 0.2  # radius
samv2-rho{RHOS}  --optmzr sgd-sam --sam-v2 --sam-rho {RHOS}
"""
# What becomes of a run is said by FATES for its rho: it fails, is killed, waits for three others, or has its sweep end.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

directory = Path(value("--output-dir"))
directory.mkdir(exist_ok=True)
seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
(directory / "begun.json").write_text(json.dumps(seen | {"argv": sys.argv[1:]}))
fate = json.loads(os.environ.get("FATES", "{}")).get(value("--sam-rho"))
if fate == "fail":
    print("error: poisoned", file=sys.stderr)
    sys.exit(1)
if fate == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "orphan":
    os.kill(os.getppid(), signal.SIGKILL)
while fate == "orphan" and not (directory / "go").exists():
    time.sleep(0.01)
while fate == "meet" and len(list(directory.parent.glob("*/begun.json"))) < 4:
    time.sleep(0.01)
if fate in ("SIGINT", "SIGTERM", "SIGHUP", "Ctrl-C"):
    def end(*_):
        (directory / "checkpoint.pt").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, end)
    if fate == "Ctrl-C":
        (directory / "ready").touch()
    else:
        os.kill(os.getppid(), getattr(signal, fate))
    time.sleep(60)
(directory / "result.json").write_text("{}")
"""


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


def grid_of(script):
    return (ROOT / "scripts" / script).read_text().split("<<'GRID'\n")[1].removesuffix("GRID\n")


def commands(done):
    return [shlex.split(line) for line in done.stdout.splitlines() if "main_prune_train.py" in line]


def value(flag, command):
    return command[command.index(flag) + 1]


def begun(directory):
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*/begun.json"))]


def refused(done):
    """Whether it ended in one sentence."""
    return (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
    )


def test_a_sweep_replays_a_file_in_all_its_runs_and_its_own_flags_win(sweep, tmp_path):
    flags = {
        "dataset": "digits",
        "depth": 8,
        "seed": 7,
        "epochs": 9,
        "prune_method": "rigl",
        "sparsity": 0.5,
        "sam_rho": 3,
    }
    (tmp_path / "args.json").write_text(json.dumps({"args": flags | {"optmzr": "sgd-sam", "drop_fraction": 0.2}}))
    done = sweep("--config", "args.json", "--dry-run", METHODS="none rigl", RHOS="0.1", EPOCHS="2")
    assert done.returncode == 0, done.stderr
    dense, rigl = (parse_and_replay(command[2:])[0] for command in commands(done))
    assert [(run.depth, run.seed, run.epochs, run.sam_rho) for run in (dense, rigl)] == [(8, 0, 2, 0.1)] * 2
    assert (dense.sparsity, dense.drop_fraction, rigl.sparsity, rigl.drop_fraction) == (None, None, 0.9, 0.2)
    (tmp_path / "args.json").write_text(json.dumps({"args": flags | {"epochs": "many"}}))
    assert refused(sweep("--config=args.json", "--dry-run"))


# what is run


@pytest.mark.parametrize(
    ("script", "arms"),
    [
        ("sweep_rho.sh", 5),
        ("sweep_v2.sh", 3),
        ("sweep_adaptive.sh", 10),
        ("sweep_sam.sh", 25),
        ("reproduce_cifar.sh", 12),
    ],
)
def test_a_dry_run_lists_every_run_of_a_grid_once_and_does_nothing(sweep, script, arms):
    settings = {"METHODS": "random rigl none", "SPARSITIES": "0.9 0.98", "SEEDS": "3 4 3"}
    done = sweep("--dry-run", grid=grid_of(script), **settings)
    listed = commands(done)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"{len(listed)} runs"
    assert (
        len(listed) == len({tuple(command) for command in listed}) == arms * 5 * 2
    )  # a dense network has one sparsity
    assert len({value("--output-dir", command) for command in listed}) == len(listed)
    assert not sweep.output.exists()


def test_the_table_of_the_paper_has_648_runs(sweep, monkeypatch):
    monkeypatch.delenv("SEEDS")
    done = sweep("--dry-run", grid=grid_of("reproduce_cifar.sh"))
    assert done.stdout.splitlines()[-1] == "648 runs"
    part = sweep(
        "--dry-run", grid=grid_of("reproduce_cifar.sh"), ARCHS="vgg", OPTIMIZERS="sgd samv2", DATASETS="cifar10"
    )
    assert part.stdout.splitlines()[-1] == "108 runs"
    assert {value("--arch", command) for command in commands(part)} == {"vgg"}


def test_the_official_profile_trains_as_the_released_scripts_and_the_default_one_does_not(sweep):
    grid, settings = grid_of("reproduce_cifar.sh"), {"SPARSITIES": "0.98", "DATASETS": "cifar10", "ARCHS": "resnet"}
    plain, official = (
        {
            Path(value("--output-dir", command)).name: set(command)
            for command in commands(sweep("--dry-run", grid=grid, **kind))
        }
        for kind in (settings, settings | {"PROFILE": "official"})
    )
    own = {name: official[name] - plain[name] for name in official}
    everywhere = set("--batch-size 64 --dense-layers stem shortcut classifier 0.973460".split())
    arms = {"sgd": {"--weight-decay", "1e-4"}, "sam": set(), "samv2": {"--adaptive", "--sam-rho", "0.05"}}
    uniform = {"--sparsity-distribution", "uniform"}
    methods = {name: set() for name in ("lth", "snip", "grasp")} | {"set": uniform, "rigl": uniform}
    methods["mest"] = uniform | set("--mest-soft --mest-lambda 0 --stop-update 0.8125".split())
    assert own == {
        f"{method}-0.98-cifar10-resnet-{arm}-seed0": everywhere | flags - {"0"} | more
        for method, flags in methods.items()
        for arm, more in arms.items()
    }


def test_sparsities_of_the_official_profile_are_those_of_the_3x3_convolutions(sweep):
    settings = {"PROFILE": "official", "METHODS": "rigl", "OPTIMIZERS": "sgd"}
    listed = commands(sweep("--dry-run", grid=grid_of("reproduce_cifar.sh"), **settings))
    assert len(listed) == 12
    for command in listed:
        args = parse(command[2:])[0]
        classes = 100 if args.dataset == "cifar100" else 10
        sizes, positions = networks(args.arch, args.depth, classes, args.width)
        selected = select_layers(list(sizes), args.dense_layers, positions=positions)
        dense = sum(sizes[name] for name in set(itertools.chain(*selected.values())))
        total = sum(sizes.values())
        named = float(Path(value("--output-dir", command)).name.split("-")[1])
        assert args.sparsity == pytest.approx(named * (total - dense) / total, abs=1e-6)


@cache
def networks(arch, depth, classes, width):
    with torch.device("meta"):
        model = build_model(arch, depth, classes, width)
    sizes = {name: weight.numel() for name, weight in prunable_weights(model).items()}
    return sizes, layers_by_position(model)


def test_runs_have_the_names_and_flags_that_they_have_always_had(sweep):
    (command,) = commands(sweep("--dry-run", "--dataset", "digits", "--remark", "", RHOS="0.1", EPOCHS="3"))
    directory = sweep.output / "random-0.9-samv2-rho0.1-seed0"
    assert shlex.join(command) == (
        "python main_prune_train.py --prune-method random --sparsity 0.9 --optmzr sgd-sam --sam-v2 --sam-rho 0.1 --seed 0 "
        f"--epochs 3 --dataset digits --remark '' --output-dir {directory} --resume auto"
    )


def test_lists_are_separated_by_any_white_space_and_jobs_is_no_octal_number(sweep):
    assert len(commands(sweep("--dry-run", RHOS="0.1\n0.2", SEEDS=" 0\t1\n2 ", JOBS="08"))) == 6


def test_paths_are_relative_to_where_the_sweep_was_called(sweep, trained, tmp_path):
    (command, _) = commands(sweep("--dry-run", "--data-dir", "images", OUTPUT_DIR="here"))
    assert value("--data-dir", command) == str(tmp_path / "images")
    assert Path(value("--output-dir", command)).parent == tmp_path / "here"
    shutil.copy(trained.directory / "checkpoint.pt", tmp_path / "a=b.pt")
    network = DIGITS.split()
    (command, _) = commands(sweep("--dry-run", *network, "--pretrained=a=b.pt"))
    assert f"--pretrained={tmp_path / 'a=b.pt'}" in command


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_settings_that_a_sweep_reads_with_its_own_defaults(sweep, script):
    shown = sweep("--help", grid=grid_of(script)).stdout
    own = dict(re.findall(r"^([A-Z]+) *= *([^#\n]*[^#\s])", grid_of(script), re.MULTILINE))
    defaults = {"METHODS": "random", "SPARSITIES": "0.9", "SEEDS": "0 1 2", "EPOCHS": "160", "JOBS": "1"} | own
    listed = re.findall(r"^  ([A-Z_]+) ", shown, re.MULTILINE)
    assert sorted(listed) == sorted([*defaults, "GPUS", "OUTPUT_DIR"])
    for name, default in defaults.items():
        assert re.search(rf"^  {name} .*\({re.escape(default)}\)$", shown, re.MULTILINE)


# what is refused


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("RHO", "RHOS"), ("SEED", "SEEDS"), ("METHOD", "METHODS"), ("SPARSITY", "SPARSITIES"), ("GPU", "GPUS")],
)
def test_a_mistyped_setting_is_refused_by_the_name_of_the_right_one(sweep, monkeypatch, wrong, right):
    monkeypatch.delenv("SEEDS")
    done = sweep("--dry-run", **{wrong: "1"})
    assert refused(done)
    assert f"{wrong} is no setting of this sweep, but {right} is" in done.stderr


@pytest.mark.parametrize("name", ["CPUS", "SLURM_JOB_ID", "HOSTNAME", "OMP_NUM_THREADS", "rhos", "ARCH", "SEED"])
def test_unrelated_variables_and_those_beside_the_right_one_are_left_alone(sweep, name):
    assert sweep("--dry-run", **{name: "1"}).returncode == 0  # SEEDS is set, and this sweep has no ARCHS


@pytest.mark.parametrize(
    "settings",
    [
        {"JOBS": "0"}, {"JOBS": "two"}, {"JOBS": "1 2"}, {"SEEDS": "0 x"}, {"SEEDS": "²"}, {"GPUS": "all"}, {"EPOCHS": "1.5"},
        {"EPOCHS": "0"}, {"RHOS": " "}, {"RHOS": "*"}, {"RHOS": "0.1\x1f--lr\x1f0.7"}, {"SPARSITIES": "90"}, {"METHODS": "rigle"},
    ],
)  # fmt: skip
def test_a_setting_that_no_run_could_have_is_refused_before_any_starts(sweep, settings):
    assert refused(sweep(**settings))
    assert not sweep.output.exists()


@pytest.mark.parametrize(
    "flags", ["--depht 20", "--depth 9", "--adaptive --mixup --alpha 0", "--warmup-epochs 500", "--no-such"]
)
def test_a_flag_that_a_run_would_refuse_is_refused_before_any_starts(sweep, flags):
    assert refused(sweep(*flags.split()))
    assert not sweep.output.exists()


@pytest.mark.parametrize(
    "flag",
    ["--seed 3", "--epochs=2", "--output-dir x", "--save-model x", "--resume auto", "--sparsity-config f.yaml", "--sparsity 0.5",
     "--prune-method set", "--evaluate x", "--sam-rho=1", "--sam-v2", "--weight-decay 0 --optmzr adam"],
)  # fmt: skip
def test_a_flag_that_the_sweep_or_one_of_its_arms_sets_is_refused(sweep, flag):
    done = sweep("--dry-run", *flag.split())
    assert refused(done)
    assert (
        f"{flag.split()[-2 if ' ' in flag else -1].split('=')[0]} ".replace("--save-model", "--output-dir")
        in done.stderr
    )


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("sgd --optmzr sgd --lr {LRS}", "no setting for {LRS}"),
        ("sgd --optmzr sgd\nsgd --optmzr sgd --lr 0.2", "two arms of the grid are called 'sgd'"),
        ("a/b --optmzr sgd\na_b --optmzr sgd --lr 0.2", "two runs of the grid are called 'random-0.9-a_b-seed0'"),
        ("ARCHS = vgg resnet\n{ARCHS=vgg} --arch vgg --optmzr sgd", "ARCHS: no arm of this sweep is for 'resnet'"),
        ("sgd --remark 'open", "a quotation in the grid has no end"),
        ("sgd --optmzr sgd\n+ {LRS=1} --lr 0.2", "no setting for {LRS}"),
        ("KIND = a b\nsgd --optmzr sgd\n+ {KIND=b} --lr 0.2", "two arms of the grid are called 'sgd'"),
        ("", "there is nothing to run"),
    ],
)
def test_a_grid_that_means_nothing_is_refused(sweep, lines, sentence):
    done = sweep("--dry-run", grid=lines)
    assert refused(done)
    assert sentence in done.stderr


def test_flags_of_a_plus_line_go_to_the_runs_that_meet_all_its_conditions(sweep):
    grid = "KIND = a\nsgd --optmzr sgd\n+ {KIND=b} {METHODS=set|rigl} {SPARSITIES=0.9} --drop-fraction 0.1"
    settings = {"METHODS": "random set rigl none", "SPARSITIES": "0.8 0.9"}
    for kind, having in (("a", []), ("b", ["set-0.9-sgd-seed0", "rigl-0.9-sgd-seed0"])):
        listed = commands(sweep("--dry-run", grid=grid, KIND=kind, **settings))
        names = [Path(value("--output-dir", command)).name for command in listed if "--drop-fraction" in command]
        assert names == having
    assert "KIND: no arm of this sweep is for 'c'" in sweep("--dry-run", grid=grid, KIND="c", **settings).stderr
    taken = sweep("--dry-run", "--weight-decay", "0", grid=f"{grid}\n+ {{KIND=a}} --weight-decay 1e-4", **settings)
    assert refused(taken)
    assert "--weight-decay is set by the sweep" in taken.stderr


def test_an_estimate_measures_a_step_of_each_optimizer_and_trains_nothing(sweep, monkeypatch):
    flags = "--estimate --device cpu --depth 8 --width 0.25 --precision fp32".split()
    done = sweep(*flags, grid=grid_of("sweep_v2.sh"), JOBS="2")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"resnet-8, width 0.25, (\S+ ?\S*) .* (\d+) epochs", done.stdout) == [
        ("sgd ", "160"), ("sgd-sam ", "160"), ("sgd-sam v2", "160"),
    ]  # fmt: skip
    assert "2 at a time" in done.stdout
    assert not sweep.output.exists()
    monkeypatch.setattr(sys, "executable", "false")
    assert sweep("--estimate").returncode == 1  # the estimate's own code


# running


def test_arguments_arrive_unchanged_and_each_run_has_a_log_of_its_own(sweep, tmp_path):
    remark = f"two words 'quoted' \"twice\" $(touch {tmp_path}/it-ran) `id` ; * \\ \n end"
    done = sweep("--remark", remark, RHOS="0.1", OUTPUT_DIR=str(tmp_path / "with space"), FATES='{"0.1": "fail"}')
    assert (done.returncode, "error: poisoned" in done.stderr) == (1, True)
    (run,) = begun(tmp_path / "with space")
    assert value("--remark", run["argv"]) == remark
    assert (tmp_path / "with space/.sweep/random-0.9-samv2-rho0.1-seed0.log").read_text() == "error: poisoned\n"
    assert not (tmp_path / "it-ran").exists()


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


def test_other_flags_for_a_run_that_was_begun_are_refused(sweep):
    sweep(RHOS="0.1", FATES='{"0.1": "fail"}')
    other = sweep("--lr", "0.2", RHOS="0.1")
    assert refused(other)
    assert "begun with other flags: give another OUTPUT_DIR" in other.stderr
    (sweep.output / "random-0.9-samv2-rho0.1-seed0" / "begun.json").unlink()
    (sweep.output / "random-0.9-samv2-rho0.1-seed0").rmdir()
    assert sweep("--lr", "0.2", RHOS="0.1").returncode == 0  # it left nothing


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
    assert sweep(grid=grid).returncode == 0
    assert (sweep.output / "copy").read_text() == "$(id); *"


# Slurm


@pytest.fixture
def submitted(sweep, tmp_path, monkeypatch):
    """submitted(**settings) submits to an sbatch that writes down what it was given; returns that."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"$0.arguments"\ncat >"$0.script"\necho "$SWEEP_LEFT" >"$0.left"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "")

    def submit(**settings):
        done = sweep("--slurm", **settings)
        assert done.returncode == 0, done.stderr
        return [Path(f"{sbatch}.{name}").read_text() for name in ("arguments", "script", "left")]

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
    arguments, script, left = submitted(RHOS="0.1 0.2 0.3", JOBS="5")
    assert {"--array=0-1%5", "--requeue", "--export=ALL", "--job-name=sweep_test"} <= set(arguments.split("\n"))
    environment = {"SWEEP_PYTHON": "echo", "SWEEP_LEFT": "$(touch it-ran) a"}
    called = subprocess.run(
        ["sh"], input=script, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert called.stdout == "-m experiment.sweep --slurm-job $(touch it-ran) a\n"
    assert not (tmp_path / "it-ran").exists()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setenv("FATES", '{"0.3": "fail"}')
    assert [job(left, number, sweep.program) for number in ("0", "1")] == [0, 1]
    assert [(value("--sam-rho", run["argv"]), run["OMP_NUM_THREADS"]) for run in begun(sweep.output)] == [
        ("0.1", "1"), ("0.2", "3"), ("0.3", "3"),
    ]  # fmt: skip
    assert [path.stem for path in sweep.output.glob(".sweep/*.failed")] == ["random-0.9-samv2-rho0.3-seed0"]


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
