"""Networks rebuilt from checkpoints, with the data they were trained on."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiment import run_directory as runs
from imagedata.images import Dataset, fingerprint, hold_out
from imagedata.loaders import Augmentation, Normalize, TrainLoader
from imagedata.sources import load_dataset
from models import build_model
from prune import Pruner
from training.checkpoint import load_checkpoint, load_network
from utils.errors import UsageError, usage_errors
from utils.precision import Execution


@dataclass(frozen=True)
class Trained:
    """A network with the weights and masks of a checkpoint.

    Attributes:
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

    def training_inputs(self, device: torch.device) -> Iterator[Tensor]:
        """The batches of an epoch, as the run was trained on them."""
        augmentation = build_augmentation(self.args, self.dataset)
        classes = len(self.dataset.classes)
        loader = TrainLoader(self.dataset.train, augmentation, classes, self.normalize, device, 0, Execution())
        return (loader.batch(step)[0] for step in range(loader.steps_per_epoch))


def open_trained(args: Namespace, given: set[str], device: torch.device) -> Trained:
    """Rebuild the network of the checkpoint `args.evaluate`.

    Raises:
        UsageError: no such checkpoint, flags that contradict it, or data it does not fit.
    """
    checkpoint = load_checkpoint(args.evaluate)
    args = runs.evaluated(args, given, checkpoint["args"])
    dataset = load_dataset(args.dataset, args.data_dir, args.image_size)
    check_fits(checkpoint, dataset)
    if 0 < args.val_split < len(dataset.train):
        dataset = hold_out(dataset, args.val_split, args.seed)
    model = build_network(args, dataset, device)
    pruner = Pruner(model)
    load_network(model, pruner, checkpoint)
    data = checkpoint["data"]
    return Trained(
        model, pruner, args, dataset, Normalize(data["mean"], data["deviation"], device),
        epochs=len(checkpoint["state"]["rows"]), images=data["fingerprint"],
        same_images=fingerprint(dataset) == data["fingerprint"],
    )  # fmt: skip


def build_network(args: Namespace, dataset: Dataset, device: torch.device) -> nn.Module:
    """The untrained network of the flags for a data set. Raises UsageError."""
    with usage_errors():
        model = build_model(args.arch, args.depth, len(dataset.classes), args.width, dataset.channels)
    return model.to(device, memory_format=torch.channels_last)


def build_augmentation(args: Namespace, dataset: Dataset) -> Augmentation:
    """What the flags do to a data set's training images."""
    return Augmentation(
        len(dataset.train), args.batch_size, args.seed, dataset.pad, dataset.flip, mixup=args.alpha or 0.0
    )


def load_weights(model: nn.Module, args: Namespace, dataset: Dataset) -> None:
    """Take the weights of --pretrained, which has to be of the same network for the same data."""
    checkpoint = load_checkpoint(args.pretrained)
    runs.evaluated(args, {"arch", "depth", "width"}, checkpoint["args"])
    check_fits(checkpoint, dataset)
    load_network(model, Pruner(model), checkpoint)


def check_fits(checkpoint: dict, dataset: Dataset) -> None:
    """Refuse a checkpoint of a network for other data."""
    classes, channels = checkpoint["data"]["classes"], len(checkpoint["data"]["mean"])
    if (classes, channels) != (dataset.classes, dataset.channels):
        raise UsageError(
            f"the checkpoint is of a network for {len(classes)} classes and {channels} channels and does not fit this "
            f"data set of {len(dataset.classes)} and {dataset.channels}: give the data it was trained on"
        )
