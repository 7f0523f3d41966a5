"""Batches cut from data sets without a loop over images: on the device, or ahead of it by worker processes.

Order and augmentation are functions of (seed, step) alone: a run that resumes, or goes back, sees what it would have
seen, wherever its batches are cut.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from imagedata.images import Images
from utils.device import memory_size, to_device
from utils.distributed import ProcessGroup
from utils.precision import Execution
from utils.signals import SIGNALS, blocked


class Normalize:
    """uint8 [B, H, W, C] to float32 [B, C, H, W] (channels last in memory), by each channel's mean and deviation."""

    def __init__(self, mean: list[float], deviation: list[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device)
        self.scale = 1 / torch.tensor(deviation, device=device).clamp_min(1)  # a constant channel stays finite

    def __call__(self, pixels: Tensor) -> Tensor:
        width = pixels.shape[2]  # by whole rows: three times as fast as broadcasting C values
        rows = pixels.flatten(2).float().sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
        return rows.view(pixels.shape).permute(0, 3, 1, 2)


Plan = tuple[Tensor, Tensor, Tensor, Tensor]


class Augmentation:
    """What a seed does to images: their order, shift and mirroring in each epoch.

    Args:
        count: images.
        batch_size: images a step; the last step of an epoch takes what is left.
        pad, flip: see Dataset.
        mixup: alpha of the Beta distribution of the mixing weight (Zhang et al. 2018); 0 for none.
    """

    def __init__(self, count: int, batch_size: int, seed: int, pad: int = 0, flip: bool = False, mixup: float = 0.0):
        self.count, self.batch_size, self.seed, self.pad, self.flip, self.mixup = (
            count,
            batch_size,
            seed,
            pad,
            flip,
            mixup,
        )
        self.steps_per_epoch = -(-count // batch_size)

    def plan(self, epoch: int) -> tuple[Plan, list[float]]:
        """Order (indices), top and left of the windows, and which are mirrored, each [count]; mixing weights by step."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(self.count)
        top, left = rng.integers(0, 2 * self.pad + 1, (2, self.count))
        mirrored = rng.random(self.count) < (0.5 if self.flip else 0.0)
        weights = rng.beta(self.mixup, self.mixup, self.steps_per_epoch).tolist() if self.mixup else []
        return tuple(map(torch.from_numpy, (order, top, left, mirrored))), weights

    def part(self, plan: Plan, position: int) -> Plan:
        """A plan's lines for one step of its epoch."""
        return tuple(line[position * self.batch_size : (position + 1) * self.batch_size] for line in plan)

    def size(self, position: int) -> int:
        """Images of an epoch's step."""
        return min(self.batch_size, self.count - position * self.batch_size)

    def smallest_part(self, accumulate: int, group: ProcessGroup = ProcessGroup()) -> int:
        """Images in the smallest micro-batch of an epoch that batch norm sees: in any process, or in all together."""
        found = []
        for size in {self.size(position) for position in (0, self.steps_per_epoch - 1)}:
            shares = torch.empty(size).tensor_split(group.world)
            parts = [list(map(len, share.tensor_split(accumulate))) for share in shares]
            found += map(sum, zip(*parts, strict=True)) if group.synchronised else itertools.chain(*parts)
        return min(filter(None, found))


def share_of(lines: Plan, group: ProcessGroup, mixed: bool) -> Plan:
    """A process's lines of a batch and, where images are mixed, after them those of their partners, as many."""
    if group.world == 1:
        return lines
    share = tuple(group.share(line) for line in lines)
    partners = (group.share(line.flip(0)) for line in lines)
    return tuple(map(torch.cat, zip(share, partners, strict=True))) if mixed else share


def cut(pixels: Tensor, order: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, pad: int) -> Tensor:
    """Windows of the padded images as one gather: uint8 [N, H, W, C] and a plan's lines [B] to uint8 [B, H, W, C]."""
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


class Stream:
    """Batches that worker processes cut ahead of the training step, from images that stay in the host's memory."""

    def __init__(self, pixels: Tensor, augmentation: Augmentation, workers: int, pin: bool, group: ProcessGroup):
        self.pixels, self.augmentation, self.workers, self.pin, self.group = pixels, augmentation, workers, pin, group
        self._epoch, self._next, self._batches = -1, -1, iter(())

    def __call__(self, step: int) -> Tensor:
        """The pixels of a step; workers start anew where it does not follow the last one."""
        if step != self._next:
            options = {"num_workers": self.workers, "pin_memory": self.pin, "multiprocessing_context": "fork"}
            options["worker_init_fn"] = _obey_the_parent_alone
            with blocked():  # and so they are in the workers from their first moment
                self._batches = iter(DataLoader(self, batch_size=None, sampler=itertools.count(step), **options))
        self._next = step + 1
        return next(self._batches)

    def __getitem__(self, step: int) -> Tensor:
        """In a worker: cut the batch of a step."""
        epoch, position = divmod(step, self.augmentation.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self.augmentation.plan(epoch)[0]
        lines = share_of(self.augmentation.part(self._plan, position), self.group, self.augmentation.mixup > 0)
        return cut(self.pixels, *lines, self.augmentation.pad)


def _obey_the_parent_alone(worker: int) -> None:
    """What ends all processes of a run at once is for the parent, which finishes its step; it ends its workers itself."""

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo(SIGNALS)
            if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    sys.excepthook = lambda *error: None  # of threads whose parent is gone; the errors of a batch go to the parent


def pick_workers(images: Images, device: torch.device) -> int:
    """Workers for images that would take more than half of the memory (on CUDA: the free memory) of the device; 0 where they may live there."""
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_size()
    return 0 if 2 * images.pixels.nbytes <= room else min(4, len(os.sched_getaffinity(0)))


class TrainLoader:
    """Augmented training batches, by step.

    Args:
        images: what to train on.
        augmentation: their order, and what becomes of them.
        normalize: what the network is to see of them.
        device: where the batches come from and, without workers, the images live.
        workers: processes that cut batches from images in the host's memory; 0 to cut them on the device.
        execution: whether the function that does so is compiled; only on CUDA, on the CPU it is fast enough.
        group: each process gets its share of a batch.
    """

    def __init__(
        self,
        images: Images,
        augmentation: Augmentation,
        num_classes: int,
        normalize: Normalize,
        device: torch.device,
        workers: int,
        execution: Execution,
        group: ProcessGroup = ProcessGroup(),
    ):
        self.augmentation, self.normalize, self.device, self.group = augmentation, normalize, device, group
        self.steps_per_epoch = augmentation.steps_per_epoch
        self.labels, self.one_hot = images.labels.to(device), torch.eye(num_classes, device=device)
        self.pixels = images.pixels if workers else images.pixels.to(device)
        self._stream = Stream(self.pixels, augmentation, workers, device.type == "cuda", group) if workers else None
        self._cut = lambda *lines: normalize(cut(self.pixels, *lines, augmentation.pad))
        if device.type == "cuda":
            self._cut = execution.compile(self._cut, -(-augmentation.batch_size // group.world))
        self._epoch = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Of a step, counted from 0: inputs float32 [B, C, H, W] and target distributions float32 [B, num_classes].

        B is this process's share of `batch_size(step)` images.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            lines, self._weights = self.augmentation.plan(epoch)
            self._plan = tuple(to_device(line, self.device) for line in lines)  # an epoch's random numbers at once
            self._epoch = epoch
        lines = share_of(self.augmentation.part(self._plan, position), self.group, bool(self._weights))
        if self._stream:
            inputs = self.normalize(self._stream(step).to(self.device, non_blocking=True))
        else:
            inputs = self._cut(*lines)
        targets = self.one_hot[self.labels[lines[0]]]
        if self._weights:
            # The partner of an image is its mirror place in the batch: the order is random already.
            weight = self._weights[position]
            inputs, targets = (self._mix(tensor, weight) for tensor in (inputs, targets))
        return inputs, targets

    def batch_size(self, step: int) -> int:
        """Images of a step's batch, the shares of all processes together."""
        return self.augmentation.size(step % self.steps_per_epoch)

    def _mix(self, tensor: Tensor, weight: float) -> Tensor:
        if self.group.world == 1:
            return tensor.mul(weight).add_(tensor.flip(0), alpha=1 - weight)
        half = len(tensor) // 2
        return tensor[:half].mul(weight).add_(tensor[half:], alpha=1 - weight)

    def sample(self, per_class: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the first images of each class in an order of its own, all classes mixed, not augmented."""
        order = torch.from_numpy(np.random.default_rng([self.augmentation.seed, 2]).permutation(len(self.labels)))
        order = order.to(self.device)
        labels = self.labels[order]
        rank = torch.zeros_like(labels)  # how many of the same class came before
        for label in range(len(self.one_hot)):
            of_class = labels == label
            rank[of_class] = torch.arange(int(of_class.sum()), device=self.device)
        chosen = order[rank < per_class].to(self.pixels.device)
        return self.normalize(self.pixels[chosen].to(self.device)), labels[rank < per_class]


class EvalLoader:
    """Batches of inputs float32 [B, C, H, W] and labels int64 [B] in the data set's order, not augmented.

    Args:
        resident: the images live on the device; else they go there batch by batch.
    """

    def __init__(
        self, images: Images, batch_size: int, normalize: Normalize, device: torch.device, resident: bool = True
    ):
        self.pixels = images.pixels.to(device) if resident else images.pixels
        self.labels = images.labels.to(device)
        self.batch_size, self.normalize = batch_size, normalize

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalize(pixels.to(labels.device)), labels

    def __len__(self) -> int:
        return len(self.labels)
