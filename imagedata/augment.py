"""What becomes of images before a network sees them: order, windows, mirroring and normalisation.

All of it follows from (seed, epoch): a run that resumes, or goes back, sees what it would have seen, wherever its batches
are cut.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class NormalizeImages(nn.Module):
    """Normalises images [B, C, H, W] to float32, to the bits of what Normalize makes of the same pixels.

    The dtype tells how they are given: uint8 holds levels from 0 to 255, floating point goes from 0 to 1.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: list[float], deviation: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("scale", 1 / torch.tensor(deviation).clamp_min(1)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images.

        Raises:
            ValueError: another dtype or number of channels, or floats that are far outside 0 to 1.
        """
        channels = len(self.mean)
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images have to be [B, {channels}, H, W], not {list(images.shape)}")
        if images.is_floating_point():
            if images.numel() and not torch.compiler.is_compiling():
                low, high = (bound.item() for bound in images.aminmax())
                if low < -1 or high > 2:  # resizing may leave 0 to 1 a little
                    raise ValueError(
                        f"floating-point images go from 0 to 1, and these from {low:g} to {high:g}: divide levels by 255 or "
                        "give them as uint8, and leave normalisation to this module"
                    )
            images = images.float() * 255
        elif images.dtype != torch.uint8:
            raise ValueError(f"images have to be uint8 or floating point, not {images.dtype}")
        return (images.float() - self.mean) * self.scale


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


class Mix(NamedTuple):
    """How the images of a step are mixed, each with a partner.

    Attributes:
        weight: of the image itself; its partner has the rest.
        centre: None for mixup, or where the box of CutMix is, as fractions of height and width.
    """

    weight: float
    centre: tuple[float, float] | None = None

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, bottom, left and right of what CutMix takes from the partner (Yun et al. 2019, equation 2)."""
        assert self.centre is not None
        edges = []
        for size, place in zip((height, width), self.centre, strict=True):
            middle, half = int(place * size), int(0.5 * math.sqrt(1 - self.weight) * size)
            edges += [max(middle - half, 0), min(middle + half, size)]
        return edges[0], edges[1], edges[2], edges[3]


class SampleTransform:
    """What becomes of each training image after its window is cut: a policy of torchvision, then random erasing.

    It takes and returns uint8 [C, H, W] and draws from torch's generator: see `own_randomness`.

    Args:
        policy: a key of POLICIES.
        erasing: probability that a box of the image is erased (Zhong et al. 2020).
        fill: level of each channel in that box.
        policies: of AutoAugment, by what torchvision calls them.
    """

    def __init__(self, policy: str, erasing: float, fill: list[float], policies: str = "IMAGENET"):
        from torchvision.transforms import v2  # here: two seconds

        makers: dict[str, Callable[[], Callable] | None] = {
            "crop-flip": None,
            "randaugment": v2.RandAugment,
            "trivialaugment": v2.TrivialAugmentWide,
            "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy[policies]),
        }
        make = makers[policy]
        self._steps: list[Callable[[Tensor], Tensor]] = [make()] if make else []
        if erasing:
            self._steps.append(v2.RandomErasing(erasing, value=[round(level) for level in fill]))

    def __call__(self, image: Tensor) -> Tensor:
        """Return the transformed image."""
        for step in self._steps:
            image = step(image)
        return image


POLICIES = ("crop-flip", "randaugment", "trivialaugment", "autoaugment")


@contextmanager
def own_randomness() -> Iterator[Callable[[int, int, int], object]]:
    """Yield a function of seed, epoch and index that sets torch's generator on the CPU; afterwards it is as before."""
    generator = torch.default_generator
    before = generator.get_state()

    def draw_from(seed: int, epoch: int, index: int) -> None:
        words = np.random.SeedSequence([seed, 6, epoch, index]).generate_state(1, np.uint64)
        generator.manual_seed(int(words[0]) >> 1)

    try:
        yield draw_from
    finally:
        generator.set_state(before)


class Augmentation:
    """Draws order, windows and mirroring of the training images of each epoch.

    Args:
        count: number of images.
        batch_size: images per step; the last step of an epoch takes what is left.
        seed: of all of it.
        pad, flip: see Dataset.
        mixup: alpha of the Beta distribution of the mixing weight (Zhang et al. 2018); 0 for none.
        cutmix: put a box of another image into each one (Yun et al. 2019); with mixup, each step does one of both.
        policy, erasing, policies: see SampleTransform.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        pad: int = 0,
        flip: bool = False,
        mixup: float = 0.0,
        cutmix: bool = False,
        policy: str = "crop-flip",
        erasing: float = 0.0,
        policies: str = "IMAGENET",
    ):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.pad, self.flip, self.mixup, self.cutmix = pad, flip, mixup, cutmix
        self.policy, self.erasing, self.policies = policy, erasing, policies
        self.steps_per_epoch = -(-count // batch_size)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix

    @property
    def by_sample(self) -> bool:
        """Whether each image is transformed by itself, which only the host can do."""
        return self.policy != "crop-flip" or self.erasing > 0

    def transform(self, fill: list[float]) -> SampleTransform | None:
        """Return what becomes of each image after its window is cut, if anything; `fill` is what is erased to."""
        return SampleTransform(self.policy, self.erasing, fill, self.policies) if self.by_sample else None

    def plan(self, epoch: int) -> tuple[Plan, list[Mix]]:
        """Return the plan of an epoch, each tensor [count], and how the images of each step are mixed, if they are."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(self.count)
        top, left = rng.integers(0, 2 * self.pad + 1, (2, self.count))
        mirrored = rng.random(self.count) < (0.5 if self.flip else 0.0)
        weights = rng.beta(self.mixup, self.mixup, self.steps_per_epoch).tolist() if self.mixup else []
        mixes = [Mix(weight) for weight in weights]
        if self.cutmix:
            rng = np.random.default_rng([self.seed, 5, epoch])  # the paper's weight is uniform, Beta(1, 1)
            drawn = rng.random((self.steps_per_epoch, 4)).tolist()
            boxes = [Mix(weight, (y, x)) for weight, y, x, _ in drawn]
            coins = [coin for *_, coin in drawn]
            mixes = [
                mix if mixes and coin < 0.5 else box
                for mix, box, coin in zip(mixes or boxes, boxes, coins, strict=True)
            ]
        return Plan(*map(torch.from_numpy, (order, top, left, mirrored))), mixes

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
