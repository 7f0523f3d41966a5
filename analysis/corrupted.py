"""Accuracy, likelihood and calibration of trained networks on clean and corrupted test images."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from imagedata.augment import Normalize
from imagedata.corruptions import CORRUPTIONS, SEVERITIES, corrupt, refuse_uncorruptible
from imagedata.images import AnyImages
from imagedata.loaders import ignore_signals
from utils.errors import UsageError
from utils.precision import Execution
from utils.signals import signals_blocked

BINS = 15  # of confidence, in the expected calibration error
CLEAN = "clean"
FIGURES = ("error", "loss", "ece")


@dataclass(frozen=True)
class Settings:
    """What networks are measured on.

    Attributes:
        images: number of test images; None for all.
        corruptions: names of corruptions.
        severities: of each corruption.
        official: directory of the files of CIFAR-10-C or CIFAR-100-C, to read instead of corrupting images.
        batch_size: images per forward pass.
        workers: processes that corrupt images; 0 to corrupt them in this process.
    """

    images: int | None = None
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    severities: tuple[int, ...] = SEVERITIES
    official: Path | None = None
    batch_size: int = 250
    # Counted when settings are made: every run imports this module, and only Linux has sched_getaffinity.
    workers: int = field(default_factory=lambda: min(16, len(os.sched_getaffinity(0))))


class Network(NamedTuple):
    """A trained network in evaluation mode, and what becomes of images before it sees them."""

    model: nn.Module
    normalize: Normalize


class Batch(NamedTuple):
    """Images of one severity of one corruption.

    Attributes:
        shift: name of the corruption, and its severity; CLEAN and 0 for images as they are.
        pixels: uint8 [B, H, W, C].
        labels: int64 [B].
        seconds: of a processor that it took to corrupt them.
    """

    shift: tuple[str, int]
    pixels: Tensor
    labels: Tensor
    seconds: float


class CorruptedImages(torch.utils.data.Dataset):
    """The test images as they are, and under each corruption at each severity, in batches.

    A part of the images is always the same one, and looks as it does among all of them.

    Args:
        test: the test images.
        settings: which images and corruptions.

    Raises:
        UsageError: images that cannot be corrupted, or official files that are not there or are not of these images.
    """

    def __init__(self, test: AnyImages, settings: Settings):
        self.test, self.settings = test, settings
        self.numbers = np.sort(np.random.default_rng(0).permutation(len(test))[: settings.images])
        if settings.official is None:
            refuse_uncorruptible(settings.corruptions, test.image_shape)
        else:
            self._read_official(settings.official)
        self.shifts = [(CLEAN, 0), *product(settings.corruptions, settings.severities)]
        starts = range(0, len(self.numbers), settings.batch_size)
        self._parts = [(shift, self.numbers[i : i + settings.batch_size]) for shift in self.shifts for i in starts]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, float] | str:
        """Return the pixels of a batch and the seconds of the processor that it took to corrupt them.

        Or the sentence that says which file cannot be read: an error in a worker would come out with a traceback.
        """
        (name, severity), numbers = self._parts[index]
        try:
            if name != CLEAN and self.settings.official is not None:
                pixels = self._official[name][(severity - 1) * len(self.test) + numbers]
                return pixels.reshape(len(numbers), *self.test.image_shape), 0.0
            images = self.test[torch.from_numpy(numbers)].load()
        except UsageError as error:
            return str(error)
        began = time.process_time()
        if name != CLEAN:
            images = corrupt(name, severity, images, numbers.tolist())
        return images.numpy(), time.process_time() - began

    def batches(self) -> Iterator[Batch]:
        """Go through all batches in order, corrupted ahead by worker processes."""
        # Arrays go through a pipe: tensors would go through shared memory, which containers keep small.
        with signals_blocked():
            loader: DataLoader = DataLoader(
                self, batch_size=None, num_workers=self.settings.workers, collate_fn=_as_it_is,
                multiprocessing_context="fork" if self.settings.workers else None,
                worker_init_fn=ignore_signals if self.settings.workers else None,
            )  # fmt: skip
            iterator = iter(loader)
        for (shift, numbers), made in zip(self._parts, iterator, strict=True):
            if isinstance(made, str):
                raise UsageError(made)
            pixels, seconds = made
            yield Batch(shift, torch.from_numpy(pixels), self.test.labels[numbers], seconds)

    def _read_official(self, directory: Path) -> None:
        """Open the files NAME.npy: the test images at severity 1, then at 2, up to 5; labels.npy has their labels."""
        count, shape = len(self.test), self.test.image_shape
        self._official = {name: _array(directory / f"{name}.npy") for name in self.settings.corruptions}
        for name, array in self._official.items():
            if array.dtype != np.uint8 or array.size != 5 * count * math.prod(shape) or len(array) != 5 * count:
                raise UsageError(
                    f"'{directory / name}.npy' is not of the test images: it has {array.dtype} {list(array.shape)} instead of "
                    f"uint8 {[5 * count, *shape]}"
                )
        labels = _array(directory / "labels.npy")
        if not np.array_equal(labels, np.tile(self.test.labels.numpy(), 5)):
            raise UsageError(
                f"'{directory / 'labels.npy'}' does not have the labels of the test images in their order, five times: the "
                "official files are for runs on --dataset cifar10 or cifar100; leave --official out to corrupt other images"
            )


def _as_it_is(batch: Any) -> Any:
    return batch


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an array of numpy"
        raise UsageError(
            f"cannot read '{path}' ({reason}): --official needs NAME.npy of each corruption and labels.npy"
        ) from error


class Scores:
    """Sums up accuracy, negative log-likelihood and calibration over batches, in float64."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits [B, classes] and labels [B]."""
        logits = logits.double()
        confidence, predicted = logits.softmax(1).max(1)
        right = (predicted == labels).double()
        self._sums += torch.stack([right.sum(), F.cross_entropy(logits, labels, reduction="sum")])
        place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # bins that hold their upper limits
        self._bins += F.one_hot(place, BINS).double().T @ torch.stack([torch.ones_like(right), right, confidence], 1)

    def figures(self) -> dict[str, float | None]:
        """Return error (percent), loss (nats) and expected calibration error (percent), or None for what is not finite.

        The last one is the mean over images of the distance between the accuracy and the mean confidence of their bin
        (Guo et al. 2017), in 15 bins of equal width.
        """
        counts, right, confidence = self._bins.unbind(1)
        images = counts.sum()
        correct, loss = (self._sums / images).tolist()
        ece = float((right - confidence).abs().sum() / images)
        found = {"error": 100 * (1 - correct), "loss": loss, "ece": 100 * ece}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


@torch.no_grad()
def measure(
    networks: Sequence[Network],
    images: CorruptedImages,
    device: torch.device,
    execution: Execution = Execution(),
    advance: Callable[[], object] = lambda: None,
) -> tuple[list[dict], dict[str, float]]:
    """Measure networks on the same images; each batch is corrupted once for all of them.

    Args:
        networks: on the device.
        images: the test images.
        device: where to compute.
        execution: how.
        advance: called after each batch; `len(images)` of them.

    Returns:
        The figures of each network: of clean images, of each corruption at each severity, and their mean over corruptions
        and severities. And how many images of each corruption a second of a processor corrupted.
    """
    scores = [{shift: Scores(device) for shift in images.shifts} for _ in networks]
    rows = images.settings.batch_size
    models = [execution.compile(network.model.eval(), rows) for network in networks]
    seconds = dict.fromkeys(images.settings.corruptions, 0.0)
    for batch in images.batches():
        pixels, labels = batch.pixels.to(device), batch.labels.to(device)
        for model, network, score in zip(models, networks, scores, strict=True):
            score[batch.shift].add(model(network.normalize(pixels)), labels)
        if batch.shift[0] != CLEAN:
            seconds[batch.shift[0]] += batch.seconds
        advance()
    of_each = len(images.numbers) * len(images.settings.severities)
    speeds = {name: of_each / max(passed, 1e-9) for name, passed in seconds.items()}
    return [_results(images, score) for score in scores], speeds


def _results(images: CorruptedImages, scores: dict[tuple[str, int], Scores]) -> dict:
    settings = images.settings
    corrupted = {
        name: {str(severity): scores[name, severity].figures() for severity in settings.severities}
        for name in settings.corruptions
    }
    shifts = [figures for severities in corrupted.values() for figures in severities.values()]
    return {
        "images": len(images.numbers),
        "source": "generated" if settings.official is None else "official",
        "clean": scores[CLEAN, 0].figures(),
        "corrupted": corrupted,
        "mean": {figure: _mean([figures[figure] for figures in shifts]) for figure in FIGURES},
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def errors_by_corruption(results: dict) -> dict[str, float]:
    """Return the error of each corruption in percent, averaged over severities."""
    return {
        name: mean(figures["error"] for figures in severities.values())
        for name, severities in results["corrupted"].items()
    }


def errors_by_severity(results: dict) -> dict[int, float]:
    """Return the error of each severity in percent, averaged over corruptions."""
    severities = next(iter(results["corrupted"].values()))
    return {
        int(severity): mean(corruption[severity]["error"] for corruption in results["corrupted"].values())
        for severity in severities
    }


def relative_corruption_errors(results: dict, baseline: dict) -> dict[str, float | None]:
    """Return CE of Hendrycks and Dietterich: a corruption's error over severities, in percent of a baseline's.

    It is None where the baseline makes no error. The mean over corruptions is their mCE.
    """
    own, other = errors_by_corruption(results), errors_by_corruption(baseline)
    return {name: 100 * own[name] / other[name] if other[name] else None for name in own}


def scalars(results: dict) -> dict[str, float]:
    """Name the figures of `measure` for TensorBoard."""
    named = {f"{part}/{figure}": results[part][figure] for part in (CLEAN, "mean") for figure in FIGURES}
    named |= {f"error/{name}": error for name, error in errors_by_corruption(results).items()}
    return {name: value for name, value in named.items() if value is not None}
