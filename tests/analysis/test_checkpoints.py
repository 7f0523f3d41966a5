"""Checkpoints of networks from elsewhere, as the commands that look at networks open them."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest

from analysis import loss_surface, robustness, sharpness
from analysis.checkpoints import add_checkpoints, named_again, open_checkpoint, study_settings
from main_prune_train import main as train

OWN = """
from torch import nn


def build(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
"""
COMMANDS = {
    sharpness: "--images 4 --splits test --spaces living --top 0 --trace-samples 2 --rhos 0.1 --adaptive-rhos --steps 1",
    loss_surface: "--images 10 --split test --dimensions 1 --resolution 3",
    robustness: "--images 10 --severities 1 --corruptions brightness --workers 0",
}


@pytest.fixture(scope="module")
def external(trained_runs, tmp_path_factory):
    """Runs of a network of one's own and of one of torchvision, and the file of the first."""
    root = tmp_path_factory.mktemp("external")
    file = root / "mine.py"
    file.write_text(OWN)
    flags = f"--dataset folder --data-dir {trained_runs.images} --epochs 1 --batch-size 16 --prune-method random --sparsity 0.5"
    for name, arch in {"own": f"{file}:build", "torchvision": "torchvision:shufflenet_v2_x0_5"}.items():
        assert train(f"{flags} --arch {arch} --output-dir {root / 'runs' / name}".split()) == 0
    return SimpleNamespace(runs=root / "runs", file=file)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
def test_networks_from_elsewhere_are_measured_where_their_function_is_named(external, tmp_path, capsys, command):
    runs = shutil.copytree(external.runs, tmp_path / "runs")
    argv = [str(runs), *COMMANDS[command].split(), "--output", str(tmp_path / "output" / "file.json")]
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    assert f"name its function again, as --arch {external.file}:build, if you trust it" in err
    assert (err.count("\n"), (tmp_path / "output").exists()) == (1, False)
    assert command.main([*argv, "--arch", f"{external.file}:build"]) == 0, capsys.readouterr().err
    assert command.main([str(runs / "torchvision"), *argv[1:]]) == 0
    capsys.readouterr()
    assert command.main([str(runs / "torchvision"), *argv[1:], "--arch", f"{external.file}:build"]) == 2
    assert f"--arch {external.file}:build has no effect" in capsys.readouterr().err


def test_an_own_network_whose_file_has_moved_is_measured_as_it_was(external, tmp_path, capsys):
    moved = shutil.copy(external.file, tmp_path / "mine.py")
    outputs = []
    for file in (external.file, moved):
        argv = [str(external.runs / "own"), *COMMANDS[sharpness].split(), "--output", str(tmp_path / "out.json")]
        assert sharpness.main([*argv, "--arch", f"{file}:build"]) == 0
        outputs.append(json.loads((tmp_path / "out.json").read_text())[0]["test"])
    assert outputs[0] == outputs[1]


def test_a_function_is_named_for_the_checkpoints_that_it_made():
    given = ["/new/mine.py:build", "/old/mine.py:build", "package.nets:small"]
    assert named_again("/old/mine.py:build", given) == "/old/mine.py:build"
    assert named_again("/gone/mine.py:build", given) == "/new/mine.py:build"
    assert named_again("package.nets:small", given) == "package.nets:small"
    for other in ("/old/mine.py:other", "/old/yours.py:build", "nets:small", "resnet", "torchvision:resnet18"):
        assert named_again(other, [*given, "torchvision:resnet18"]) is None


def test_runs_whose_images_and_labels_their_seed_chose_are_of_one_study(trained_runs, tmp_path):
    flags = f"--dataset folder --data-dir {trained_runs.images} --epochs 1 --batch-size 16 --depth 8 --width 0.25 --compile off"
    parser = argparse.ArgumentParser()
    add_checkpoints(parser)
    opened = []
    for seed in (0, 1):
        run = tmp_path / str(seed)
        assert train(f"{flags} --train-images 15 --label-noise 0.4 --seed {seed} --output-dir {run}".split()) == 0
        opened.append(open_checkpoint(run / "checkpoint.pt", parser.parse_args([str(run)]))[0])
    assert opened[0].images != opened[1].images
    assert study_settings(opened[0]) == study_settings(opened[1])
