"""Batches cut from data sets on the device, without a loop over images.

Order and augmentation are functions of (seed, step) alone: a run that resumes, or goes back, sees what it would have
seen.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data import Images


class Normalize:
    """uint8 [B, H, W, C] to float32 [B, C, H, W] (channels last in memory), by each channel's mean and deviation."""

    def __init__(self, mean: list[float], deviation: list[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device)
        self.scale = 1 / torch.tensor(deviation, device=device).clamp_min(1)  # a constant channel stays finite

    def __call__(self, pixels: Tensor) -> Tensor:
        width = pixels.shape[2]  # by whole rows: three times as fast as broadcasting C values
        rows = pixels.flatten(2).float().sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
        return rows.view(pixels.shape).permute(0, 3, 1, 2)


class TrainLoader:
    """Augmented training batches, by step.

    Args:
        images: what to train on.
        batch_size: images a step; the last step of an epoch takes what is left.
        normalize: what the network is to see of them.
        seed: with the step it decides order and augmentation.
        device: where the images live and the batches come from.
        pad, flip: see Dataset.
        mixup: alpha of the Beta distribution of the mixing weight (Zhang et al. 2018); 0 for none.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        num_classes: int,
        normalize: Normalize,
        seed: int,
        device: torch.device,
        pad: int = 0,
        flip: bool = False,
        mixup: float = 0.0,
    ):
        self.count, self.batch_size, self.seed, self.pad, self.flip, self.mixup = (
            len(images), batch_size, seed, pad, flip, mixup,
        )  # fmt: skip
        self.steps_per_epoch = -(-self.count // batch_size)
        self.normalize = normalize
        self.height, self.width = images.pixels.shape[1:3]
        self.pixels = F.pad(images.pixels, (0, 0, pad, pad, pad, pad)).to(device)
        self.targets = F.one_hot(images.labels, num_classes).float().to(device)
        self.image_shape = (images.pixels.shape[3], self.height, self.width)
        self.device, self.epoch = device, -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs float32 [B, C, H, W] and target distributions float32 [B, num_classes] of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self._draw(epoch)
        chosen = slice(position * self.batch_size, (position + 1) * self.batch_size)
        order = self.order[chosen]
        inputs = self.normalize(self._crop(order, self.top[chosen], self.left[chosen], self.mirrored[chosen]))
        targets = self.targets[order]
        if self.mixup:
            # The partner of an image is its mirror place in the batch: the order is random already.
            weight = self.weights[position]
            inputs = inputs.mul(weight).add_(inputs.flip(0), alpha=1 - weight)
            targets = targets.mul(weight).add_(targets.flip(0), alpha=1 - weight)
        return inputs, targets

    def smallest_part(self, accumulate: int) -> int:
        """Images in the smallest micro-batch of an epoch."""
        whole = [min(self.batch_size, self.count), self.count % self.batch_size or self.batch_size]
        return min(len(torch.empty(size).chunk(accumulate)[-1]) for size in whole)

    def sample(self, per_class: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the first images of each class in an order of its own, all classes mixed, not augmented."""
        order = torch.from_numpy(np.random.default_rng([self.seed, 2]).permutation(self.count)).to(self.device)
        labels = self.targets[order].argmax(1)
        rank = torch.zeros_like(labels)  # how many of the same class came before
        for label in range(self.targets.shape[1]):
            of_class = labels == label
            rank[of_class] = torch.arange(int(of_class.sum()), device=self.device)
        chosen = order[rank < per_class]
        middle = torch.full_like(chosen, self.pad)
        return self.normalize(self._crop(chosen, middle, middle, middle < 0)), labels[rank < per_class]

    def _draw(self, epoch: int) -> None:
        """All random numbers of an epoch, moved to the device at once."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        to_device = lambda array: torch.from_numpy(array).to(self.device)  # noqa: E731
        self.order = to_device(rng.permutation(self.count))
        self.top, self.left = to_device(rng.integers(0, 2 * self.pad + 1, (2, self.count)))
        self.mirrored = to_device(rng.random(self.count) < (0.5 if self.flip else 0.0))
        self.weights = rng.beta(self.mixup, self.mixup, self.steps_per_epoch).tolist() if self.mixup else []
        self.epoch = epoch

    def _crop(self, order: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
        """Windows of the padded images as one gather of pixels: uint8 [B, H, W, C]."""
        _, padded_height, padded_width, channels = self.pixels.shape
        x = torch.arange(self.width, device=self.device)
        rows = top[:, None] + torch.arange(self.height, device=self.device)
        columns = left[:, None] + torch.where(mirrored[:, None], self.width - 1 - x, x)
        index = (order[:, None, None] * padded_height + rows[:, :, None]) * padded_width + columns[:, None, :]
        pixels = self.pixels.view(-1, channels).index_select(0, index.flatten())
        return pixels.view(len(order), self.height, self.width, channels)


class EvalLoader:
    """Batches of inputs float32 [B, C, H, W] and labels int64 [B] in the data set's order, not augmented."""

    def __init__(self, images: Images, batch_size: int, normalize: Normalize, device: torch.device):
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        self.batch_size, self.normalize = batch_size, normalize

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalize(pixels), labels

    def __len__(self) -> int:
        return len(self.labels)
