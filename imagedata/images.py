"""Data sets: their images, their fingerprint, held-out images and channel statistics."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagedata.augment import Plan, SampleTransform, cut, own_randomness
from imagedata.files import DEVIATION, MEAN, ImageFiles


@dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        pixels: uint8 [N, H, W, C].
        labels: int64 [N].
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, [H, W, C]."""
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        return self.pixels[0].nbytes

    def identity(self) -> Iterator[Any]:
        """Return what the images are recognised by: all of them."""
        yield f"{tuple(self.pixels.shape)}".encode()
        yield self.pixels.contiguous().numpy().data
        yield self.labels.numpy().data

    def load(self) -> Tensor:
        """Return the images: uint8 [N, H, W, C]."""
        return self.pixels

    def augmented(self, plan: Plan, pad: int, epoch: int, seed: int, transform: SampleTransform | None) -> Tensor:
        """Return training images: windows, and what a transform makes of each by (seed, epoch, index) alone.

        Args:
            plan: which images, and their windows.
            pad: see `augment.cut`.
            epoch, seed: see above.
            transform: of a window, or None.
        """
        pixels = cut(self.pixels, plan.order, plan.top, plan.left, plan.mirrored, pad)
        if transform:
            with own_randomness() as draw_from:
                for place, index in enumerate(plan.order.tolist()):
                    draw_from(seed, epoch, index)
                    pixels[place] = transform(pixels[place].permute(2, 0, 1)).permute(1, 2, 0)
        return pixels


AnyImages = Images | ImageFiles


@dataclass(frozen=True)
class Dataset:
    """A training and a test set, and the augmentation that suits them.

    Attributes:
        classes: names, by label.
        val: images held out of `train`, or None.
        pad: training images are shifted by up to this many pixels each way, black coming in.
        flip: training images are mirrored left to right half of the time.
        train, test: the splits.
    """

    train: AnyImages
    test: AnyImages
    classes: list[str]
    pad: int
    flip: bool
    val: AnyImages | None = None

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train.image_shape[2]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, [C, H, W]."""
        height, width, channels = self.train.image_shape
        return channels, height, width


def fingerprint(dataset: Dataset) -> str:
    """Return a hash of all images and labels, by which a data set is recognised; of files, their names and sizes."""
    digest = hashlib.sha256()
    for images in (dataset.train, dataset.test, dataset.val):
        if images is not None:
            for part in images.identity():
                digest.update(part)
    return digest.hexdigest()


def hold_out(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Move `count` training images to `val`, the same ones for every run of a seed.

    Raises:
        ValueError: none would be left to train on.
    """
    if count >= len(dataset.train):
        raise ValueError(
            f"cannot hold out {count} of {len(dataset.train):,} training images: none would be left; give a --val-split below that"
        )
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(dataset.train)))
    return replace(dataset, train=dataset.train[order[count:]], val=dataset.train[order[:count]])


def balanced_part(images: AnyImages, count: int, classes: int, seed: int) -> AnyImages:
    """Return `count` images in random order, as many of each class as of the others to within one.

    Args:
        images: what to draw from, without replacement.
        count: number of images.
        classes: number of classes.
        seed: of the draw.

    Raises:
        ValueError: a class has too few images, or would have none.
    """
    if count < classes:
        raise ValueError(
            f"--train-images {count} leaves some of {classes} classes without an image: give {classes} or more"
        )
    rng = np.random.default_rng([seed, 3])
    order, labels = rng.permutation(len(images)), images.labels.numpy()
    quota = np.full(classes, count // classes)
    quota[rng.permutation(classes)[: count % classes]] += 1
    available = np.bincount(labels, minlength=classes)
    if (available < quota).any():
        most = int(available.min()) * classes
        raise ValueError(
            f"{count:,} training images, the same number of each class, are more than there are: at most {most:,}"
        )
    chosen = [order[labels[order] == label][: quota[label]] for label in range(classes)]
    return images[torch.from_numpy(rng.permutation(np.concatenate(chosen)))]


def with_label_noise(images: AnyImages, fraction: float, classes: int, seed: int) -> AnyImages:
    """Return images of which this fraction, to the nearest image, has a random other label (symmetric noise).

    Args:
        images: they stay as they are.
        fraction: of the labels that become wrong, 0 to 1.
        classes: number of classes, at least 2.
        seed: of the choice.

    Raises:
        ValueError: there is one class, and no other label to give; or the fraction comes to no label.
    """
    if classes < 2:
        raise ValueError("label noise needs two classes or more: leave --label-noise out")
    rng = np.random.default_rng([seed, 4])
    wrong = torch.from_numpy(rng.permutation(len(images))[: round(fraction * len(images))])
    if fraction and not len(wrong):
        raise ValueError(
            f"--label-noise {fraction:g} makes none of {len(images):,} labels wrong: give more, or leave it out"
        )
    labels = images.labels.clone()
    labels[wrong] = (labels[wrong] + torch.from_numpy(rng.integers(1, classes, len(wrong)))) % classes
    return replace(images, labels=labels)


def channel_statistics(images: AnyImages) -> dict[str, list[float]]:
    """Return mean and standard deviation of each channel over all pixels, in levels from 0 to 255.

    Those of files are ImageNet's: nobody reads a large data set through for this.
    """
    if isinstance(images, ImageFiles):
        return {"mean": MEAN, "deviation": DEVIATION}
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.zeros(images.pixels.shape[3], 256, dtype=torch.float64)
    for part in images.pixels.split(4096):  # in parts, since all of it may not fit in memory
        counts += torch.stack([torch.bincount(c.flatten(), minlength=256) for c in part.unbind(3)])
    fraction = counts / counts.sum(1, keepdim=True)
    mean = fraction @ levels
    deviation = (fraction @ levels.square() - mean.square()).clamp_min(0).sqrt()
    return {"mean": mean.tolist(), "deviation": deviation.tolist()}
