"""Batches of training and test images: cut on the device, or ahead of the training step by worker processes."""

import contextlib
import copy
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from imagedata.augment import Augmentation, Normalize, cut, part_of_process
from imagedata.images import Images
from utils.device import memory_size, to_device
from utils.distributed import ProcessGroup
from utils.errors import TrainingError
from utils.precision import Execution
from utils.signals import SIGNALS, signals_blocked

SHARED_MEMORY = "/dev/shm"  # where worker processes leave their batches on Linux


class Batch(NamedTuple):
    """A training batch.

    Attributes:
        inputs: float32 [B, C, H, W], this process's part of it.
        targets: float32 [B, num_classes], distributions over the classes.
        size: images of the whole batch, over all processes.
    """

    inputs: Tensor
    targets: Tensor
    size: int


class Stream(torch.utils.data.Dataset):
    """Cuts batches ahead of the training step in worker processes, from images that stay in the host's memory."""

    def __init__(self, pixels: Tensor, augmentation: Augmentation, workers: int, pin: bool, group: ProcessGroup):
        self.pixels, self.augmentation, self.workers, self.pin, self.group = pixels, augmentation, workers, pin, group
        self._epoch, self._next, self._batches = -1, -1, iter(())

    def __call__(self, step: int) -> Tensor:
        """Return the pixels of a step. Workers start anew where it does not follow the last one."""
        if step != self._next:
            self._batches = iter(())  # ends the workers of before
            self._refuse_full_memory()
            with signals_blocked():  # and so they are in the workers from their first moment
                # A copy: a cycle of references would keep workers until garbage is collected, and for seconds then.
                loader: DataLoader = DataLoader(
                    copy.copy(self), batch_size=None, sampler=itertools.count(step), num_workers=self.workers,
                    pin_memory=self.pin, multiprocessing_context="fork", worker_init_fn=_ignore_signals,
                )  # fmt: skip
                self._batches = iter(loader)
        self._next = step + 1
        pixels: Tensor | None = next(self._batches)
        if pixels is None:
            raise self._full_memory()
        return pixels

    def __getitem__(self, step: int) -> Tensor | None:
        """Cut the batch of a step, in a worker, into shared memory; None where that is full."""
        epoch, position = divmod(step, self.augmentation.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self.augmentation.plan(epoch)[0]
        plan = part_of_process(self.augmentation.part(self._plan, position), self.group, self.augmentation.mixup > 0)
        pixels = cut(self.pixels, plan.order, plan.top, plan.left, plan.mirrored, self.augmentation.pad)
        try:
            return (
                pixels.share_memory_()
            )  # by the worker's queue it would fail in a thread, and the parent wait for ever
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return None

    def _refuse_full_memory(self) -> None:
        """Raise TrainingError where shared memory has no room for the batches that are cut ahead: two per worker."""
        with contextlib.suppress(OSError):  # not Linux
            place = os.statvfs(SHARED_MEMORY)
            batch = self.augmentation.batch_size * self.pixels[0].nbytes // self.group.world
            if place.f_bavail * place.f_frsize < (2 * self.workers + 1) * batch:
                raise self._full_memory()

    def _full_memory(self) -> TrainingError:
        return TrainingError(
            f"shared memory ({SHARED_MEMORY}) has no room for the batches of {self.workers} worker processes: make room "
            "there, or give fewer --workers (--workers 0: none), and go on by --resume auto"
        )


def _ignore_signals(worker: int) -> None:
    """Make a worker ignore signals to the whole run: the parent finishes its step and stops the workers itself."""

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    sys.excepthook = lambda *error: None  # of threads whose parent is gone; the errors of a batch go to the parent


def pick_workers(images: Images, device: torch.device) -> int:
    """Return how many workers should cut batches; 0 where the images may live on the device.

    They may where they take at most half of its memory (on CUDA: of the free memory).
    """
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_size()
    return 0 if 2 * images.pixels.nbytes <= room else min(4, len(os.sched_getaffinity(0)))


class TrainLoader:
    """Augmented training batches, by schedule step.

    Args:
        images: what to train on.
        augmentation: their order, and what becomes of them.
        num_classes: of the targets.
        normalize: the last thing that becomes of them.
        device: where the batches are and, without workers, the images live.
        workers: processes that cut batches from images in the host's memory; 0 to cut them on the device.
        execution: whether the function that cuts is compiled; only on CUDA, on the CPU it is fast enough.
        group: each process gets its part of a batch.
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
        self._cut = _cut_and_normalize(self.pixels, normalize, augmentation.pad)
        if device.type == "cuda":
            self._cut = execution.compile(self._cut, -(-augmentation.batch_size // group.world))
        self._epoch = -1

    def batch(self, step: int) -> Batch:
        """Return the batch of a schedule step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            plan, self._weights = self.augmentation.plan(epoch)
            self._plan = plan.map(lambda values: to_device(values, self.device))  # an epoch's random numbers at once
            self._epoch = epoch
        plan = part_of_process(self.augmentation.part(self._plan, position), self.group, bool(self._weights))
        if self._stream:
            inputs = self.normalize(self._stream(step).to(self.device, non_blocking=True))
        else:
            inputs = self._cut(*plan)
        targets = self.one_hot[self.labels[plan.order]]
        if self._weights:
            # The partner of an image is its mirror place in the batch: the order is random already.
            weight = self._weights[position]
            inputs, targets = self._mix(inputs, weight), self._mix(targets, weight)
        return Batch(inputs, targets, self.augmentation.size(position))

    def _mix(self, tensor: Tensor, weight: float) -> Tensor:
        if self.group.world == 1:
            return tensor.mul(weight).add_(tensor.flip(0), alpha=1 - weight)
        half = len(tensor) // 2
        return tensor[:half].mul(weight).add_(tensor[half:], alpha=1 - weight)

    def sample(self, per_class: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of so many images of each class, not augmented, all classes mixed in random order."""
        order = torch.from_numpy(np.random.default_rng([self.augmentation.seed, 2]).permutation(len(self.labels)))
        order = order.to(self.device)
        labels = self.labels[order]
        rank = torch.zeros_like(labels)  # how many of the same class came before
        for label in range(len(self.one_hot)):
            of_class = labels == label
            rank[of_class] = torch.arange(int(of_class.sum()), device=self.device)
        chosen = order[rank < per_class].to(self.pixels.device)
        return self.normalize(self.pixels[chosen].to(self.device)), labels[rank < per_class]


def _cut_and_normalize(pixels: Tensor, normalize: Normalize, pad: int) -> Callable[..., Tensor]:
    """Return a function of a plan's order, top, left and mirrored. It is no method, so that no loader refers to itself."""

    def cut_and_normalize(order: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
        return normalize(cut(pixels, order, top, left, mirrored, pad))

    return cut_and_normalize


class EvalLoader:
    """Batches of inputs float32 [B, C, H, W] and labels int64 [B] in the data set's order, not augmented.

    Args:
        images: what to evaluate on.
        batch_size: images at once.
        normalize: what becomes of them.
        device: where the batches are.
        resident: whether the images live on the device, instead of going there batch by batch.
        group: each process gets its part of the images.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        normalize: Normalize,
        device: torch.device,
        resident: bool = True,
        group: ProcessGroup = ProcessGroup(),
    ):
        images = Images(group.share(images.pixels), group.share(images.labels))
        self.pixels = images.pixels.to(device) if resident else images.pixels
        self.labels = images.labels.to(device)
        self.batch_size, self.normalize = batch_size, normalize

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalize(pixels.to(labels.device)), labels

    def __len__(self) -> int:
        return len(self.labels)
