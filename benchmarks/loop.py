"""This project's training as something to measure: an epoch of a few steps at a time."""

import contextlib
import sys
from pathlib import Path

import torch

from imagedata.images import Images, channel_statistics
from imagedata.loaders import Augmentation, EvalLoader, Normalize, TrainLoader
from models import build_model
from prune import Pruner, Timing
from prune.flops import FlopsMeter, count_flops
from training.checkpoint import TrainState
from training.logger import Logger
from training.loop import Recipe, build_objective, evaluate, train_epoch, update_weights
from training.nonfinite import NonFiniteGuard
from training.optim import build_optimizer, perturbation_of, state_holders
from utils.precision import Execution

BATCH = 128
CLASSES = 10
LOG_INTERVAL, UPDATE_INTERVAL = 50, Timing(1).interval  # the defaults of the command line


class Loop:
    """Parts as main_prune_train.py puts them together, masks at 90% sparsity.

    Args:
        images: as many as an epoch is to have.
        directory: for what a run writes; made here.
        optimizer, v2, method: see the command line.
        network: architecture, depth and width.
    """

    def __init__(
        self,
        device: torch.device,
        execution: Execution,
        images: Images,
        directory: Path,
        optimizer: str = "sgd-sam",
        v2: bool = True,
        method: str = "none",
        network: tuple[str, int | None, float] = ("resnet", 20, 1.0),
    ):
        torch.manual_seed(0)
        arch, depth, width = network
        self.model = build_model(arch, depth, CLASSES, width).to(device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(
            optimizer, self.model, lr=0.1, weight_decay=5e-4, momentum=0.9, rho=0.05, v2=v2
        )
        self.pruner = Pruner(
            self.model, method, None if method == "none" else 0.9, timing=Timing(10**9, interval=UPDATE_INTERVAL),
            optimizers=state_holders(self.optimizer),
        )  # fmt: skip
        normalize = Normalize(**channel_statistics(images), device=device)
        augmentation = Augmentation(len(images), BATCH, seed=0, pad=4, flip=True)
        self.loader = TrainLoader(images, augmentation, CLASSES, normalize, device, 0, execution)
        self.pruner.before_training(self.loader.sample)
        guard = NonFiniteGuard(self.model, execution.precision == "fp16", device=device.type)
        self.state = TrainState(self.model, self.optimizer, self.pruner, guard)
        self.perturbation = perturbation_of(self.optimizer, self.model, self.pruner)
        self.meter = FlopsMeter(count_flops(self.model, (3, 32, 32)), self.pruner, self.perturbation.passes)
        self.objective, self.execution = build_objective(self.model, execution, BATCH), execution
        self.update = execution.graph(update_weights)
        directory.mkdir()
        self.logger = Logger(directory, {}, "", [], 0, "loss", 1)
        self.testing = EvalLoader(images, 500, normalize, device)

    def run(self, log_interval: int = LOG_INTERVAL) -> None:
        recipe = Recipe(
            self.objective, self.execution, self.perturbation, self.update, lambda step: 0.1, 10**9,
            log_interval=log_interval,
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            train_epoch(self.state, recipe, self.loader, self.meter, self.logger)

    def evaluate(self) -> None:
        evaluate(self.model, self.testing, self.execution)


def random_images(count: int) -> Images:
    """Of CIFAR's shape; speed does not depend on what they show."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % CLASSES)
