"""Batches of training and test images: cut on the device, or ahead of the training step by worker processes."""

import contextlib
import copy
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from imagedata.augment import Augmentation, Normalize, SampleTransform, cut, part_of_process
from imagedata.files import ImageFiles
from imagedata.images import AnyImages, Images
from utils.device import memory_size, to_device
from utils.distributed import ProcessGroup, launched
from utils.errors import TrainingError, UsageError
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
    """Makes batches ahead of the training step in worker processes, from images in the host's memory or in files."""

    def __init__(
        self,
        images: AnyImages,
        augmentation: Augmentation,
        workers: int,
        pin: bool,
        group: ProcessGroup,
        transform: SampleTransform | None = None,
    ):
        self.images, self.augmentation, self.workers, self.pin, self.group = images, augmentation, workers, pin, group
        self.transform = transform
        self._epoch, self._next = -1, -1
        self._batches: Iterator[Tensor] = iter(())

    def __call__(self, step: int) -> Tensor:
        """Return the pixels of a step. Workers start anew where it does not follow the last one."""
        if not self.workers:
            return self.augmented(step)
        if step != self._next:
            self._batches = iter(())  # ends the workers of before
            refuse_full_memory(self.images, self.augmentation.batch_size // self.group.world, self.workers)
            # A copy: a cycle of references would keep workers until garbage is collected, and for seconds then.
            self._batches = in_workers(copy.copy(self), itertools.count(step), self.workers, self.pin)
        self._next = step + 1
        return next(self._batches)

    def __getitem__(self, step: int) -> Tensor | str:
        """Make the batch of a step, in a worker."""
        return shared(lambda: self.augmented(step))

    def augmented(self, step: int) -> Tensor:
        """Make the batch of a step."""
        epoch, position = divmod(step, self.augmentation.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self.augmentation.plan(epoch)[0]
        plan = part_of_process(self.augmentation.part(self._plan, position), self.group, self.augmentation.mixes)
        return self.images.augmented(plan, self.augmentation.pad, epoch, self.augmentation.seed, self.transform)


class EvalStream(torch.utils.data.Dataset):
    """Makes batches of images as they are evaluated, from files."""

    def __init__(self, images: AnyImages, batch_size: int):
        self.images, self.batch_size = images, batch_size

    def __getitem__(self, number: int) -> Tensor | str:
        """Make a batch, in a worker."""
        return shared(lambda: self.batch(number))

    def batch(self, number: int) -> Tensor:
        """Make a batch."""
        first = number * self.batch_size
        return self.images[torch.arange(first, min(first + self.batch_size, len(self.images)))].load()


def in_workers(batches: torch.utils.data.Dataset, numbers: Iterable[int], workers: int, pin: bool) -> Iterator[Tensor]:
    """Return the batches of these numbers, made ahead by worker processes.

    Raises:
        UsageError: an image that cannot be read.
        TrainingError: shared memory is full.
    """
    with signals_blocked():  # and so they are in the workers from their first moment
        loader: DataLoader = DataLoader(
            batches, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=pin,  # type: ignore[arg-type]
            multiprocessing_context="fork", worker_init_fn=ignore_signals,
        )  # fmt: skip
        made = iter(loader)
    return _checked(made, workers)


def _checked(made: Iterator[Tensor | str], workers: int) -> Iterator[Tensor]:
    for pixels in made:
        if isinstance(pixels, str):
            raise UsageError(pixels) if pixels else _full_memory(workers)
        yield pixels


def shared(make: Callable[[], Tensor]) -> Tensor | str:
    """Return a batch in shared memory; "" where that is full, or the sentence that says which image cannot be read.

    An error in a worker would come out of torch with a traceback, or in a thread, and the parent wait for ever.
    """
    try:
        return make().share_memory_()
    except UsageError as error:
        return str(error)
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return ""


def refuse_full_memory(images: AnyImages, batch_size: int, workers: int) -> None:
    """Raise TrainingError where shared memory has no room for the batches that are made ahead: two per worker."""
    with contextlib.suppress(OSError):  # not Linux
        place = os.statvfs(SHARED_MEMORY)
        if place.f_bavail * place.f_frsize < (2 * workers + 1) * batch_size * images.image_bytes:
            raise _full_memory(workers)


def _full_memory(workers: int) -> TrainingError:
    return TrainingError(
        f"shared memory ({SHARED_MEMORY}) has no room for the batches of {workers} worker processes: make room "
        "there, or give fewer --workers (--workers 0: none), and launch again; a training goes on by --resume auto"
    )


def ignore_signals(worker: int) -> None:
    """Make a worker ignore signals to the whole run: the parent finishes its step and stops the workers itself."""

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    sys.excepthook = lambda *error: None  # of threads whose parent is gone; the errors of a batch go to the parent


def pick_workers(images: AnyImages, device: torch.device, by_sample: bool = False) -> int:
    """Return how many workers should make batches; 0 where the images may live on the device.

    They may where they take at most half of its memory (on CUDA: of the free memory). Images in files take all cores that
    this process has, up to 16.

    Args:
        images: what to train on.
        device: where.
        by_sample: each image is transformed by itself, which only the host can do.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // launched("LOCAL_WORLD_SIZE", 1))
    if isinstance(images, ImageFiles):
        return min(16, cores)
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_size()
    stays = 2 * len(images) * images.image_bytes <= room and not by_sample
    return 0 if stays else min(4, cores)


class TrainLoader:
    """Augmented training batches, by schedule step.

    Args:
        images: what to train on.
        augmentation: their order, and what becomes of them.
        num_classes: of the targets.
        normalize: the last thing that becomes of them.
        device: where the batches are and, without workers, the images live.
        workers: processes that make batches from images in the host's memory or in files; 0 to cut them on the device, or
            where only the host can do it in this process.
        execution: whether the function that cuts is compiled; only on CUDA, on the CPU it is fast enough.
        group: each process gets its part of a batch.
    """

    def __init__(
        self,
        images: AnyImages,
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
        self.images, self._stream = images, None
        if workers or augmentation.by_sample or isinstance(images, ImageFiles):
            transform = augmentation.transform(normalize.mean.tolist())
            self._stream = Stream(images, augmentation, workers, device.type == "cuda", group, transform)
        else:
            self.images = Images(images.pixels.to(device), self.labels)
            self._cut = _cut_and_normalize(self.images.pixels, normalize, augmentation.pad)
            if device.type == "cuda":
                self._cut = execution.compile(self._cut, -(-augmentation.batch_size // group.world))
        self._epoch = -1

    def batch(self, step: int) -> Batch:
        """Return the batch of a schedule step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            plan, self._mixes = self.augmentation.plan(epoch)
            self._plan = plan.map(lambda values: to_device(values, self.device))  # an epoch's random numbers at once
            self._epoch = epoch
        plan = part_of_process(self.augmentation.part(self._plan, position), self.group, bool(self._mixes))
        if self._stream:
            inputs = self.normalize(self._stream(step).to(self.device, non_blocking=True))
        else:
            inputs = self._cut(*plan)
        targets = self.one_hot[self.labels[plan.order]]
        if self._mixes:
            # The partner of an image is its mirror place in the batch: the order is random already.
            mix = self._mixes[position]
            if mix.centre is None:
                inputs, targets = self._mix(inputs, mix.weight), self._mix(targets, mix.weight)
            else:
                top, bottom, left, right = mix.box(*inputs.shape[2:])
                own, partners = self._pairs(inputs)
                inputs = own.clone()
                inputs[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
                share = (bottom - top) * (right - left) / math.prod(inputs.shape[2:])
                targets = self._mix(targets, 1 - share)
        return Batch(inputs, targets, self.augmentation.size(position))

    def _mix(self, tensor: Tensor, weight: float) -> Tensor:
        own, partners = self._pairs(tensor)
        return own.mul(weight).add_(partners, alpha=1 - weight)

    def _pairs(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is of this process's images, and what is of their partners."""
        if self.group.world == 1:
            return tensor, tensor.flip(0)
        half = len(tensor) // 2
        return tensor[:half], tensor[half:]

    def sample(self, per_class: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of so many images of each class, not augmented, all classes mixed in random order."""
        order = torch.from_numpy(np.random.default_rng([self.augmentation.seed, 2]).permutation(len(self.labels)))
        order = order.to(self.device)
        labels = self.labels[order]
        rank = torch.zeros_like(labels)  # how many of the same class came before
        for label in range(len(self.one_hot)):
            of_class = labels == label
            rank[of_class] = torch.arange(int(of_class.sum()), device=self.device)
        chosen = order[rank < per_class].to(self.images.labels.device)
        return self.normalize(self.images[chosen].load().to(self.device)), labels[rank < per_class]


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
        workers: processes that decode images in files.
    """

    def __init__(
        self,
        images: AnyImages,
        batch_size: int,
        normalize: Normalize,
        device: torch.device,
        resident: bool = True,
        group: ProcessGroup = ProcessGroup(),
        workers: int = 0,
    ):
        if isinstance(images, Images):
            images = Images(group.share(images.pixels), group.share(images.labels))
            if resident:
                images = Images(images.pixels.to(device), images.labels)
        else:
            images = images[group.share(torch.arange(len(images)))]
        self.labels = images.labels.to(device)
        self.images, self.batch_size, self.normalize, self.workers = images, batch_size, normalize, workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in zip(self._pixels(), self.labels.split(self.batch_size), strict=True):
            yield self.normalize(pixels.to(labels.device, non_blocking=True)), labels

    def _pixels(self) -> Iterable[Tensor]:
        if isinstance(self.images, Images):
            return self.images.pixels.split(self.batch_size)
        stream, numbers = EvalStream(self.images, self.batch_size), range(-(-len(self.images) // self.batch_size))
        if not self.workers:
            return map(stream.batch, numbers)
        refuse_full_memory(self.images, self.batch_size, self.workers)
        return in_workers(stream, numbers, self.workers, self.labels.device.type == "cuda")

    def __len__(self) -> int:
        return len(self.labels)
