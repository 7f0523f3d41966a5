"""A trained network together with the images of its run, as the commands that measure it need them."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiment import build
from experiment.checks import evaluated_flags
from experiment.load import rebuild
from imagedata.augment import Normalize
from imagedata.images import Dataset, fingerprint
from imagedata.loaders import TrainLoader
from imagedata.sources import load_dataset
from prune import Pruner
from utils.precision import Execution


@dataclass(frozen=True)
class TrainedRun:
    """A trained network together with the images of its run.

    Attributes:
        model: the network.
        pruner: its masks.
        args: the flags of its run, with those of this command in their place.
        dataset: training images split as the run split them.
        normalize: with the figures of the run's training images, whatever `dataset` holds.
        epochs: finished ones.
        images: fingerprint of what the run was trained on.
        same_images: whether `dataset` is that.
    """

    model: nn.Module
    pruner: Pruner
    args: Namespace
    dataset: Dataset
    normalize: Normalize
    epochs: int
    images: str
    same_images: bool

    def training_inputs(self, device: torch.device, workers: int = 0) -> Iterator[Tensor]:
        """Return the inputs of an epoch's batches, made by so many processes, as the run was trained on them."""
        loader = TrainLoader(
            self.dataset.train, build.augmentation(self.args, self.dataset), len(self.dataset.classes), self.normalize,
            device, workers, Execution(),
        )  # fmt: skip
        return (loader.batch(step).inputs for step in range(loader.steps_per_epoch))


def open_run(checkpoint: dict, args: Namespace, given: set[str], device: torch.device) -> TrainedRun:
    """Return a trained network, and the images of its run.

    Args:
        checkpoint: what load_checkpoint returned.
        args, given: flags of this command, see flags.parse.
        device: where the network is to be.

    Raises:
        UsageError: flags that contradict the network, or data that it does not fit.
    """
    args, about = evaluated_flags(args, given, checkpoint["args"]), checkpoint["data"]
    data = load_dataset(args.dataset, args.data_dir, args.image_size)
    build.check_fits(about, data)
    loaded = rebuild(checkpoint, device, args.arch, data.image_shape[1:])
    with contextlib.suppress(ValueError):  # of other data than the run's, which may have fewer images
        data = build.training_part(args, data)
    pruner = Pruner(loaded.model)
    pruner.masks = loaded.masks
    return TrainedRun(
        loaded.model, pruner, args, data, Normalize(about["mean"], about["deviation"], device),
        epochs=loaded.metrics["epoch"], images=about["fingerprint"], same_images=fingerprint(data) == about["fingerprint"],
    )  # fmt: skip
