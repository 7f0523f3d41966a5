"""This project's training as something to measure: one epoch of a few steps at a time."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

from experiment import build
from experiment.checks import check
from experiment.flags import parse, resolve
from imagedata.augment import Normalize
from imagedata.images import Dataset, Images, channel_statistics
from prune import METHODS
from prune.flops import FlopsMeter, count_flops
from training.logger import Logger
from training.loop import Run, evaluate, train_epoch
from training.optim import passes_per_step
from utils.precision import Execution

BATCH = 128
CLASSES = 10
LOG_INTERVAL = int(parse([])[0].log_interval)  # the defaults of the command line
MASK_INTERVAL = 100  # steps between two changes of the masks


class Loop:
    """The parts of main_prune_train.py, for a schedule that does not end; masks at 90% sparsity.

    Args:
        device: where to train.
        execution: how to compute.
        images: as many as an epoch is to have.
        directory: for what a run writes; made here.
        optimizer, v2, method: see the flags --optmzr, --sam-v2 and --prune-method.
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
        arch, depth, width = network
        flags = f"--optmzr {optimizer} --arch {arch} --lr 0.1 --lr-scheduler constant --epochs 100000000"
        flags += f" --batch-size {BATCH} --precision {execution.precision} --workers 0"
        flags += f" --depth {depth}" if depth else ""
        flags += f" --width {width}" if width != 1 else ""  # which networks from elsewhere do not have
        flags += " --sam-v2" if v2 and optimizer.endswith("-sam") else ""
        flags += "" if method == "none" else f" --prune-method {method} --sparsity 0.9"
        flags += f" --update-interval {MASK_INTERVAL}" if METHODS[method].has_interval else ""
        args, given = parse(flags.split())
        check(args, given)
        args = resolve(args)
        data = Dataset(images, images, [str(label) for label in range(CLASSES)], pad=4, flip=True)
        normalize = Normalize(**channel_statistics(images), device=device)
        torch.manual_seed(0)
        self.model = build.network(args, data, device)
        loader, evaluators = build.loaders(args, data, normalize, device, execution)
        steps = args.epochs * loader.steps_per_epoch
        self.optimizer = build.optimizer(args, self.model, steps)
        self.pruner = build.pruner(args, self.model, [self.optimizer], steps)
        self.pruner.choose_masks(loader.sample)
        state = build.state(args, self.model, self.optimizer, self.pruner)
        # A logged step measures no ascent: an epoch of few steps has too large a share of them.
        step = build.step(args, state, execution, loader.steps_per_epoch, measure_ascent=False)
        flops = count_flops(self.model, data.image_shape)
        self.meter = FlopsMeter(flops, self.pruner.masks, passes_per_step(self.optimizer))
        directory.mkdir()
        logger = Logger(directory)
        self._run = Run(state, step, loader, evaluators, self.meter, logger, None, steps, execution=execution)

    def run(self, log_interval: int = LOG_INTERVAL) -> None:
        """Train for an epoch."""
        with contextlib.redirect_stdout(sys.stderr):
            train_epoch(replace(self._run, log_interval=log_interval))

    def evaluate(self) -> None:
        """Evaluate on the images."""
        evaluate(self.model, self._run.evaluators["test"], self._run.execution)


def random_images(count: int) -> Images:
    """Return images of CIFAR's shape; speed does not depend on what they show."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % CLASSES)
