"""Images that stay in their files: decoded when a batch needs them, never more than the batches in flight."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagedata.augment import Plan, SampleTransform, own_randomness
from utils.errors import UsageError

JPEG = b"\xff\xd8"  # as such a file begins
MEAN, DEVIATION = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, in levels from 0 to 255


@dataclass(frozen=True)
class ImageFiles:
    """Images of one split, by file.

    For training an image is cropped at random, resized to a square and mirrored half of the time (Szegedy et al. 2015, as
    the usual scripts for ImageNet do); for evaluation its smaller side is resized to 8/7 of the square's, whose centre is
    cropped.

    Attributes:
        root: where the names begin.
        names: of all files of the split, one after the other in bytes, uint8.
        ends: where each name ends.
        rows: which of the names these images have.
        labels: int64 [N].
        sizes: bytes of each file, by name.
        side: of the square, in pixels.
    """

    root: Path
    names: np.ndarray
    ends: np.ndarray
    rows: Tensor
    labels: Tensor
    sizes: np.ndarray
    side: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "ImageFiles":
        return replace(self, rows=self.rows[index], labels=self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, [H, W, C]."""
        return self.side, self.side, 3

    @property
    def image_bytes(self) -> int:
        """Bytes of an image, decoded."""
        return self.side * self.side * 3

    def name(self, index: int) -> bytes:
        """Return the name of a file below the root."""
        row = int(self.rows[index])
        return self.names[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()

    def identity(self) -> Iterator[Any]:
        """Return what the images are recognised by: names, sizes and labels. No file is read for it."""
        yield f"files {self.side} {len(self)}".encode()
        for index in range(len(self)):
            yield self.name(index) + b"\0"
        yield self.sizes[self.rows.numpy()].tobytes()
        yield self.labels.numpy().data

    def load(self) -> Tensor:
        """Return the images as they are evaluated: uint8 [N, H, W, C]."""
        resize, _ = _views(self.side)
        pixels = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        for index in range(len(self)):
            _put(resize(self._decode(index)), pixels[index])
        return pixels

    def augmented(self, plan: Plan, pad: int, epoch: int, seed: int, transform: SampleTransform | None) -> Tensor:
        """Return training images, each cut by random numbers that follow from the seed, the epoch and its index.

        Args:
            plan: its order says which images.
            pad: has no meaning here.
            epoch, seed: see above.
            transform: what becomes of an image after it is cropped and mirrored.
        """
        _, crop = _views(self.side)
        pixels = torch.empty(len(plan.order), *self.image_shape, dtype=torch.uint8)
        with own_randomness() as draw_from:
            for place, index in enumerate(plan.order.tolist()):
                draw_from(seed, epoch, index)
                image = crop(self._decode(index))
                _put(transform(image) if transform else image, pixels[place])
        return pixels

    def _decode(self, index: int) -> Tensor:
        """Return an image as uint8 [3, H, W].

        Torchvision decodes a JPEG to the same pixels as Pillow in two thirds of the time (`python -m benchmarks.images`). The
        other formats are Pillow's: torchvision's PNG decoder ends the process at a damaged file.
        """
        path = os.path.join(os.fsencode(self.root), self.name(index))
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
            if not content.startswith(JPEG):
                return decode_any(content)
            try:
                return decode_jpeg(content)
            except (ImportError, RuntimeError):  # unusual: Pillow reads more, and says what is wrong
                return decode_any(content)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"'{os.fsdecode(path)}' is not a readable image ({error}): mend or remove it") from error


def _put(image: Tensor, pixels: Tensor) -> None:
    """Copy an image [C, H, W] to pixels [H, W, C], plane by plane: in a third of the time of permuting it."""
    for plane, place in zip(image, pixels.unbind(-1), strict=True):
        place.copy_(plane)


def decode_jpeg(content: bytes) -> Tensor:
    """Decode a JPEG by torchvision: uint8 [3, H, W]. Raises RuntimeError, or ImportError without it."""
    from torchvision import io  # its successor, TorchCodec, is a package of its own

    return io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), io.ImageReadMode.RGB)


def decode_any(content: bytes) -> Tensor:
    """Decode an image by Pillow: uint8 [3, H, W]."""
    with Image.open(io.BytesIO(content)) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels of more than 8 bits")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@lru_cache
def _views(side: int) -> tuple[Any, Any]:
    """Return what becomes of an image in evaluation, and in training."""
    from torchvision.transforms import v2

    evaluation = v2.Compose([v2.Resize(round(side * 8 / 7), antialias=True), v2.CenterCrop(side)])
    return evaluation, v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()])
