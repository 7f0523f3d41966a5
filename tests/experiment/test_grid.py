"""What the grid of a sweep, its settings and its flags ask for, and what of it is refused."""

import itertools
import json
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from running import DIGITS
from sweeps import ROOT, SCRIPTS, commands, grid_of, refused, value

from experiment.config import parse_and_replay
from experiment.flags import parse
from experiment.sweep import main
from models import build_model
from prune.masks import layers_by_position, prunable_weights, select_layers


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


def test_arms_stay_apart_beside_a_file(sweep, tmp_path):
    flags = {"dataset": "digits", "optmzr": "sgd-sam", "sam_v2": True, "sam_direction": "momentum", "sam_rho": -0.1}
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"args": flags | {"adaptive": True, "lr": 0.2}}))
    grid = """
    sgd --optmzr sgd
    sam --optmzr sgd-sam --sam-rho 0.1
    samv2 --optmzr sgd-sam --sam-v2 --sam-rho 0.1
    asam --optmzr sgd-sam --adaptive --sam-rho 0.1 --weight-decay 0
    """
    done = sweep("--config", "args.json", "--dry-run", grid=grid)
    assert done.returncode == 0, done.stderr
    runs = [parse_and_replay(command[2:])[0] for command in commands(done)]
    assert [(run.optmzr, run.sam_v2, run.adaptive, run.lr) for run in runs] == [
        ("sgd", False, False, 0.2), ("sgd-sam", False, False, 0.2), ("sgd-sam", True, False, 0.2), ("sgd-sam", False, True, 0.2),
    ]  # fmt: skip
    assert [run.sam_direction for run in runs][2] == "momentum"  # no arm sets it
    path.write_text(json.dumps({"args": flags | {"weight_decay": 0.01}}))  # without one, it is the optimizer's own
    runs = [parse(command[2:])[0] for command in commands(sweep("--config", "args.json", "--dry-run", grid=grid))]
    assert [run.weight_decay for run in runs] == [None, None, None, 0]
    path.write_text(
        json.dumps({"args": {"dataset": "digits", "prune_method": "random", "sparsity": 0.5, "dense_layers": ["stem"]}})
    )
    lists = "one --optmzr sgd --dense-layers classifier\n    other --optmzr sgd"
    runs = [parse(command[2:])[0] for command in commands(sweep("--config", "args.json", "--dry-run", grid=lists))]
    assert [run.dense_layers for run in runs] == [["classifier"], []]


@pytest.mark.parametrize("written", [["--arch", "own.py:build"], ["--arch=own.py:build"]])
def test_a_network_of_ones_own_is_taken_from_where_the_sweep_was_launched(sweep, tmp_path, written):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\n\ndef build(classes, channels, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))\n"
    )
    done = sweep("--dry-run", "--dataset", "digits", *written)
    assert done.returncode == 0, done.stderr
    for command in commands(done):
        assert parse(command[2:])[0].arch == f"{tmp_path / 'own.py'}:build"


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


def test_a_sparsity_that_one_of_several_data_sets_cannot_have_is_refused(sweep):
    settings = {"METHODS": "random", "SPARSITIES": "0.995", "ARCHS": "resnet", "OPTIMIZERS": "sgd", "SEEDS": "0"}
    flags = "--dry-run --sparsity-distribution uniform --dense-layers classifier".split()
    grid = grid_of("reproduce_cifar.sh")
    assert sweep(*flags, grid=grid, DATASETS="cifar10", **settings).returncode == 0
    both = sweep(*flags, grid=grid, DATASETS="cifar10 cifar100", **settings)
    assert both.returncode == 2
    assert "is possible" in both.stderr


def test_the_table_of_the_paper_has_756_runs(sweep, monkeypatch):
    monkeypatch.delenv("SEEDS")
    done = sweep("--dry-run", grid=grid_of("reproduce_cifar.sh"))
    assert done.stdout.splitlines()[-1] == "756 runs"
    part = sweep(
        "--dry-run", grid=grid_of("reproduce_cifar.sh"), ARCHS="vgg", OPTIMIZERS="sgd samv2", DATASETS="cifar10"
    )
    assert part.stdout.splitlines()[-1] == "126 runs"
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
    methods = {name: set() for name in ("lth", "snip", "grasp")} | {"set": uniform, "dsr": uniform, "rigl": uniform}
    methods["mest"] = uniform | set("--mest-soft --mest-lambda 0 --stop-update 0.8125".split())
    assert own == {
        f"{method}-0.98-cifar10-resnet-{arm}-seed0": everywhere | flags - {"0"} | more
        for method, flags in methods.items()
        for arm, more in arms.items()
    }


def test_a_dense_network_has_no_flags_of_sparse_ones_in_the_official_profile(sweep):
    settings = {"PROFILE": "official", "METHODS": "none", "OPTIMIZERS": "sgd", "DATASETS": "cifar10", "SEEDS": "0"}
    listed = commands(sweep("--dry-run", grid=grid_of("reproduce_cifar.sh"), **settings))
    assert [shlex.join(command[2:]).partition(" --output-dir")[0] for command in listed] == [
        f"--prune-method none --dataset cifar10 {network} --optmzr sgd --batch-size 64 --weight-decay 1e-4 --seed 0 --epochs 160"
        for network in ("--arch resnet --depth 32 --width 2", "--arch vgg --depth 19")
    ]


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


def test_a_sparsity_is_the_same_however_it_is_written(sweep):
    settings = {"PROFILE": "official", "METHODS": "rigl", "OPTIMIZERS": "sgd", "ARCHS": "resnet", "DATASETS": "cifar10"}
    for written in ("0.9", "0.90", ".9"):
        (command,) = commands(
            sweep("--dry-run", grid=grid_of("reproduce_cifar.sh"), **settings, SEEDS="0", SPARSITIES=written)
        )
        assert parse(command[2:])[0].sparsity == 0.893993


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
    (command, _) = commands(sweep("--dry-run", *network, "--pretrained", "a=b.pt"))
    assert value("--pretrained", command) == str(tmp_path / "a=b.pt")
    (command, _) = commands(sweep("--dry-run", *network, "--pretrained=a=b.pt"))
    assert f"--pretrained={tmp_path / 'a=b.pt'}" in command
    pruned = sweep(
        "--dry-run", "--dataset", "digits", "--width", "0.25", "--depth", "8", "--pretrained=a=b.pt", METHODS="oneshot"
    )
    assert pruned.returncode == 0, pruned.stderr


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


def test_a_setting_of_another_sweep_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATASETS", "cifar100")
    with pytest.raises(SystemExit) as refused:
        main(["scripts/sweep_v2.sh", str(ROOT), "--dry-run"], grid_of("sweep_v2.sh"))
    sentence = "error: DATASETS is a setting of reproduce_cifar.sh, and not of this sweep: unset it\n"
    assert (refused.value.code, *capsys.readouterr()) == (2, "", sentence)


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
    "flags",
    [
        "--depht 20",
        "--depth 9",
        "--adaptive --mixup --alpha 0",
        "--warmup-epochs 500",
        "--no-such",
        "--checkpoint-every 0",
        "--dataset folder --data-dir nowhere",
    ],
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
        ("RHOS = 0.1\nsam --optmzr sgd-sam\n+ --sam-rho {RHOS}", "'{RHOS}' in a line of added flags"),
        ("KIND = a b\nsgd{KIND} --optmzr sgd\n+ --remark x{KIND=b}", "'x{KIND=b}' in a line of added flags"),
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


def test_an_estimate_measures_steps_and_trains_nothing(sweep, monkeypatch):
    flags = "--estimate --device cpu --depth 8 --width 0.25 --precision fp32".split()
    done = sweep(*flags, JOBS="2")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"resnet-8, width 0.25, (.*\S)  .* (\d+) epochs", done.stdout) == [("sgd-sam v2", "320")]
    assert "2 at a time" in done.stdout
    assert not sweep.output.exists()
    monkeypatch.setattr(sys, "executable", "false")
    assert sweep("--estimate").returncode == 1  # the estimate's own code
