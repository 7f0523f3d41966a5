"""Trained networks and run directories that the tests of analysis/ share."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from main_prune_train import main

SPARSE_SAM = "--prune-method random --sparsity 0.8 --optmzr sgd-sam --sam-v2"


@dataclass(frozen=True)
class TrainedRuns:
    """Two runs of seeds 0 and 1: 30 training and 15 test images of 8 x 8 pixels in three classes, one epoch."""

    flags: str
    images: Path
    root: Path

    def checkpoint(self, seed: int) -> Path:
        return self.root / f"seed{seed}" / "checkpoint.pt"


def write_images(root: Path, seed: int) -> Path:
    random = np.random.default_rng(seed)
    for split, count in (("train", 10), ("test", 5)):
        for label in range(3):
            directory = root / split / str(label)
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(60 * label, 60 * label + 100, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / f"{number}.png")
    return root


@pytest.fixture
def image_folder():
    """image_folder(directory, seed) writes images as those of the trained runs and returns the directory."""
    return write_images


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    images = write_images(root / "images", seed=0)
    network = "--depth 8 --width 0.0625 --batch-size 8 --epochs 1 --precision fp32"
    flags = f"--dataset folder --data-dir {images} {network} {SPARSE_SAM}"
    for seed in (0, 1):
        assert main(f"{flags} --seed {seed} --output-dir {root / 'runs' / f'seed{seed}'}".split()) == 0
    return TrainedRuns(flags, images, root / "runs")


RUN_FLAGS = {
    "adaptive": False, "optmzr": "sgd", "output_dir": "x", "prune_method": "random", "resume": "auto", "sam_rho": None,
    "sam_v2": False, "seed": 0, "sparsity": 0.9, "lr": 0.1, "dataset": "cifar10", "arch": "resnet", "depth": 32, "width": 2.0,
    "epochs": 160, "update_interval": None,
}  # fmt: skip


@pytest.fixture
def study(tmp_path):
    """study(accuracy, flag=value, ...) leaves a run; without an accuracy one that did not finish."""

    def add(accuracy, images=None, processes=1, epochs_done=2, held_out=None, **flags):
        directory = tmp_path / "study" / f"run{len(list(tmp_path.glob('study/*')))}"
        directory.mkdir(parents=True)
        args = RUN_FLAGS | flags | {"output_dir": str(directory)}
        about = {"args": args, "git": "abc123", "device": "cuda:0", "images": images, "processes": processes}
        (directory / "args.json").write_text(json.dumps(about))
        last = [accuracy] if accuracy else []
        curve = [50.0] * (epochs_done - 1) + last
        lines = "".join(f"{epoch},{value}\n" for epoch, value in enumerate(curve, 1))
        (directory / "metrics.csv").write_text("epoch,test_top1\n" + lines)
        if accuracy:
            result = {"test_top1": accuracy, "sparsity": 0.9, "seed": args["seed"], "args": args}
            if held_out:
                result["val_top1"] = held_out
            (directory / "result.json").write_text(json.dumps(result))
        return directory

    add.root = tmp_path / "study"
    return add
