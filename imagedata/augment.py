"""What becomes of images before a network sees them: order, windows, mirroring and normalisation.

All of it follows from (seed, epoch): a run that resumes, or goes back, sees what it would have seen, wherever its batches
are cut.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import ProcessGroup


class Normalize:
    """Normalises by each channel's mean and deviation: uint8 [B, H, W, C] to float32 [B, C, H, W], channels last."""

    def __init__(self, mean: list[float], deviation: list[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device)
        self.scale = 1 / torch.tensor(deviation, device=device).clamp_min(1)  # a constant channel stays finite

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the normalised images."""
        width = pixels.shape[2]  # whole rows: three times as fast as broadcasting C values
        rows = pixels.flatten(2).float().sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
        return rows.view(pixels.shape).permute(0, 3, 1, 2)


class Plan(NamedTuple):
    """What a seed does to the images of an epoch, or of one step of it; a value per image in each.

    Attributes:
        order: indices of the images.
        top, left: corners of the windows in the padded images.
        mirrored: whether an image is mirrored.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    mirrored: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Plan":
        """Return a plan of what a function makes of each tensor."""
        return Plan(*map(function, self))


class Augmentation:
    """Draws order, windows and mirroring of the training images of each epoch.

    Args:
        count: number of images.
        batch_size: images per step; the last step of an epoch takes what is left.
        seed: of all of it.
        pad, flip: see Dataset.
        mixup: alpha of the Beta distribution of the mixing weight (Zhang et al. 2018); 0 for none.
    """

    def __init__(self, count: int, batch_size: int, seed: int, pad: int = 0, flip: bool = False, mixup: float = 0.0):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.pad, self.flip, self.mixup = pad, flip, mixup
        self.steps_per_epoch = -(-count // batch_size)

    def plan(self, epoch: int) -> tuple[Plan, list[float]]:
        """Return the plan of an epoch, each tensor [count], and the mixing weight of each step (none without mixup)."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(self.count)
        top, left = rng.integers(0, 2 * self.pad + 1, (2, self.count))
        mirrored = rng.random(self.count) < (0.5 if self.flip else 0.0)
        weights = rng.beta(self.mixup, self.mixup, self.steps_per_epoch).tolist() if self.mixup else []
        return Plan(*map(torch.from_numpy, (order, top, left, mirrored))), weights

    def part(self, plan: Plan, position: int) -> Plan:
        """Return the part of an epoch's plan for the step at a position in it."""
        return plan.map(lambda values: values[position * self.batch_size : (position + 1) * self.batch_size])

    def size(self, position: int) -> int:
        """Return the number of images of the step at a position in its epoch."""
        return min(self.batch_size, self.count - position * self.batch_size)

    def smallest_part(self, accumulate: int, group: ProcessGroup = ProcessGroup()) -> int:
        """Return the number of images in the smallest micro-batch of an epoch that batch norm sees.

        Args:
            accumulate: micro-batches per step.
            group: each process sees its own images, or those of all if batch norm is synchronised.
        """
        found: list[int] = []
        for size in {self.size(position) for position in (0, self.steps_per_epoch - 1)}:
            shares = torch.empty(size).tensor_split(group.world)
            parts = [list(map(len, share.tensor_split(accumulate))) for share in shares]
            found += map(sum, zip(*parts, strict=True)) if group.synchronised else itertools.chain(*parts)
        return min(filter(None, found))


def part_of_process(plan: Plan, group: ProcessGroup, mixed: bool) -> Plan:
    """Return a process's part of a step's plan and, where images are mixed, after it the part of their partners."""
    if group.world == 1:
        return plan
    own = plan.map(group.share)
    if not mixed:
        return own
    partners = plan.map(lambda values: group.share(values.flip(0)))
    return Plan(*(torch.cat(pair) for pair in zip(own, partners, strict=True)))


def cut(pixels: Tensor, order: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, pad: int) -> Tensor:
    """Return windows of the padded images, cut by one gather: uint8 [N, H, W, C] to uint8 [B, H, W, C].

    Args:
        pixels: of all images.
        order, top, left, mirrored: [B], see Plan.
        pad: pixels of black on each side.
    """
    _, height, width, channels = pixels.shape
    if not len(order):
        return pixels[:0]
    padded = F.pad(pixels[order], (0, 0, pad, pad, pad, pad))
    x = torch.arange(width, device=pixels.device)
    rows = top[:, None] + torch.arange(height, device=pixels.device)
    rows += torch.arange(len(order), device=pixels.device)[:, None] * padded.shape[1]
    columns = left[:, None] + torch.where(mirrored[:, None], width - 1 - x, x)
    index = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, index.flatten()).view(len(order), height, width, channels)
