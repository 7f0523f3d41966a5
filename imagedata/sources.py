"""Where images come from: torchvision's CIFAR, a folder of image files, or the digits that ship with scikit-learn."""

import contextlib
import hashlib
import math
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from imagedata.images import Dataset, Images
from utils.device import memory_size
from utils.errors import UsageError
from utils.files import load_whole, save_atomically

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_dataset(name: str, data_dir: Path | None = None, image_size: int | None = None) -> Dataset:
    """Load a data set into memory.

    Args:
        name: a key of DATASETS.
        data_dir: where its files are, or are downloaded to.
        image_size: side in pixels that `folder` brings images to.

    Raises:
        UsageError: data that is not there, cannot be read, or does not fit together.
    """
    return DATASETS[name](data_dir, image_size)


def cifar(classes: int) -> Callable[[Path | None, int | None], Dataset]:
    """Return a loader of CIFAR-10 or CIFAR-100, which torchvision downloads on first use and verifies by checksum."""

    def load(data_dir: Path | None, image_size: int | None) -> Dataset:
        from torchvision import datasets  # here: two seconds, for whoever asks for --help or has mistyped a flag

        cls, root = getattr(datasets, f"CIFAR{classes}"), data_dir or Path("data")
        if hasattr(tarfile, "data_filter"):  # from Python 3.10.12 and 3.11.4 on; before, the checksum alone guards
            tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # torchvision names none
        splits = []
        for train in (True, False):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    split = cls(root, train=train, download=True)
            except (OSError, RuntimeError, tarfile.TarError) as error:
                raise UsageError(
                    f"CIFAR-{classes} is not in '{root}' and could not be downloaded ({error}): connect to the network once, "
                    f"put its '{cls.filename}' there, name the place that has it by --data-dir, or train without one on --dataset digits or folder"
                ) from error
            splits.append(Images(torch.from_numpy(split.data), torch.tensor(split.targets)))
        return Dataset(splits[0], splits[1], classes=split.classes, pad=4, flip=True)

    return load


def digits(data_dir: Path | None, image_size: int | None) -> Dataset:
    """Load 1,797 handwritten digits of 8x8 pixels (UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998).

    Every fifth image of each class is for testing (355), the others for training (1,442).
    """
    from sklearn.datasets import load_digits  # here: it costs the other data sets half a second

    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[..., None]
    labels = torch.from_numpy(data.target).long()
    rank = torch.empty_like(labels)  # how many images of the same class came before
    for label in range(10):
        of_class = labels == label
        rank[of_class] = torch.arange(int(of_class.sum()))
    images, test = Images(pixels, labels), rank % 5 == 4
    return Dataset(images[~test], images[test], classes=[str(label) for label in range(10)], pad=1, flip=False)


def folder(data_dir: Path | None, image_size: int | None) -> Dataset:
    """Load DIR/train/<class>/* and DIR/test/<class>/* (or DIR/val), decoded once and cached in DIR/.decoded.

    Images are brought to image_size by cropping the larger side about the centre and resizing (bilinear). Without an
    image_size all have to be of one size. Grey images make a data set of one channel if all are grey.
    """
    if data_dir is None:
        raise UsageError("--dataset folder needs --data-dir DIR with DIR/train/<class>/* and DIR/test/<class>/*")
    test = next((name for name in ("test", "val") if os.path.isdir(data_dir / name)), "test")
    splits = [_list_images(data_dir / name) for name in ("train", test)]
    if splits[0].classes != splits[1].classes:
        odd = sorted(set(splits[0].classes) ^ set(splits[1].classes))
        raise UsageError(
            f"'{data_dir}/train' and '{data_dir}/{test}' have different classes: '{odd[0]}' is in one only"
        )
    key = _content_key(data_dir, [path for split in splits for path in split.paths], image_size)
    cache = data_dir / ".decoded" / f"{key}.pt"
    pixels = _load_cached(cache, [len(split.paths) for split in splits])
    if pixels is None:
        pixels = [_decode_all(split.paths, image_size, cache.parent) for split in splits]
        channels = max(p.shape[3] for p in pixels)
        pixels = [p.expand(*p.shape[:3], channels).contiguous() for p in pixels]
        if pixels[0].shape[1:] != pixels[1].shape[1:]:
            raise UsageError(f"images in '{data_dir}' differ in size between train and {test}: give --image-size")
        _save_cached(cache, pixels)
    images = [Images(p, torch.tensor(split.labels)) for p, split in zip(pixels, splits, strict=True)]
    return Dataset(images[0], images[1], classes=splits[0].classes, pad=4, flip=True)


DATASETS: dict[str, Callable[[Path | None, int | None], Dataset]] = {
    "cifar10": cifar(10),
    "cifar100": cifar(100),
    "folder": folder,
    "digits": digits,
}

SIZES = {
    "cifar10": (10, 3),
    "cifar100": (100, 3),
    "digits": (10, 1),
}  # classes and channels that are known without the data
SIDES = {"cifar10": 32, "cifar100": 32, "digits": 8}  # of images, in pixels


@dataclass(frozen=True)
class _Files:
    """The image files of one split.

    Attributes:
        classes: names of the class directories, sorted.
        paths: of the files, class by class.
        labels: of each file, an index into `classes`.
    """

    classes: list[str]
    paths: list[str]
    labels: list[int]


def _list_images(directory: Path) -> _Files:
    """List the images of a directory by class, without what tools leave there: hidden files and directories."""
    try:
        classes = sorted(
            entry.name for entry in os.scandir(directory) if entry.is_dir() and not _is_left_over(entry.name)
        )
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        if not directory.is_dir():
            reason = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise UsageError(f"'{directory}' {reason}: --data-dir needs train/<class>/* and test/<class>/*") from error
    files = _Files(classes, [], [])
    for label, name in enumerate(classes):
        found = list(_images_below(directory / name))
        if not found:
            raise UsageError(f"'{directory}' has a class without an image, '{name}': put some there, or remove it")
        files.paths.extend(found)
        files.labels.extend([label] * len(found))
    if not classes:
        raise UsageError(
            f"'{directory}' has no folder for each class: --data-dir needs train/<class>/* and test/<class>/*"
        )
    return files


def _images_below(directory: Path) -> Iterator[str]:
    """Return the paths of the images in a directory and below it, sorted."""
    places = []
    for place, folders, files in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not _is_left_over(name)]
        places.append((place, files))
    for place, files in sorted(places):
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not _is_left_over(name):
                yield os.path.join(place, name)


def _is_left_over(name: str) -> bool:
    """Return whether a file or directory is a tool's: .ipynb_checkpoints, ._photo.png, .DS_Store, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def _content_key(root: Path, paths: list[str], image_size: int | None) -> str:
    """Hash names, contents and the size they are brought to, so that the cache never serves a changed file."""
    digest = hashlib.sha256(f"1 {image_size}".encode())
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
        except OSError as error:
            raise UsageError(f"'{path}' cannot be read ({error.strerror}): mend or remove it") from error
        digest.update(
            os.fsencode(f"\0{os.path.relpath(path, root)}\0{len(content)}\0")
        )  # any name that a file may have
        digest.update(content)
    return digest.hexdigest()[:32]


def _decode_all(paths: list[str], image_size: int | None, scratch: Path) -> torch.Tensor:
    """Decode images to uint8 [N, H, W, C]; C is 1 if all images are grey, else 3."""
    size = (image_size, image_size) if image_size else _decode(paths[0], None).shape[:2]
    pixels = _room_for((len(paths), *size, 3), scratch)
    grey = True
    for index, image in enumerate(_decode_in_threads(paths, image_size)):
        if image.shape[:2] != size:
            sizes = " and ".join(f"{width}x{height}" for height, width in (size, image.shape[:2]))
            raise UsageError(f"images differ in size ({sizes}: '{paths[0]}' and '{paths[index]}'): give --image-size")
        pixels[index] = image  # a grey image fills all three channels
        grey = grey and image.shape[2] == 1
    if grey:
        colour, pixels = pixels, _room_for((*pixels.shape[:3], 1), scratch)
        pixels[:] = colour[..., :1]
    return torch.from_numpy(pixels)


def _room_for(shape: tuple[int, ...], scratch: Path) -> np.ndarray:
    """Return an array in memory or, if it takes more than half of that, in a file that goes with its last user."""
    size = math.prod(shape)
    if size <= memory_size() / 2:
        return np.empty(shape, dtype=np.uint8)
    try:
        scratch.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is known now, not by a bus error later
            return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)
    except OSError as error:
        raise UsageError(
            f"{shape[0]:,} images of {shape[2]}x{shape[1]} take {size / 2**30:,.1f} GiB, too much for memory, and "
            f"'{scratch}' does not take them ({error.strerror}): make room there, or give a smaller --image-size"
        ) from error


def _decode(path: str, image_size: int | None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{image.mode} pixels of more than 8 bits")
            decoded = image.convert("L" if image.mode in ("1", "L") else "RGB")
        if image_size:
            decoded = ImageOps.fit(decoded, (image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(decoded).reshape(decoded.height, decoded.width, -1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"'{path}' is not a readable image ({error}): mend or remove it") from error


def _decode_in_threads(paths: list[str], image_size: int | None) -> Iterator[np.ndarray]:
    """Decode images in order, 256 in each task: one task per image would cost more than decoding a small one."""
    batches = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(batches), 64):  # in pieces, so that a large data set does not pile up in memory
            for images in pool.map(
                lambda batch: [_decode(path, image_size) for path in batch], batches[start : start + 64]
            ):
                yield from images


def _load_cached(cache: Path, counts: list[int]) -> list[torch.Tensor] | None:
    try:
        pixels = load_whole(cache, mmap=True)  # read piece by piece: it may be larger than memory
        fits = [len(p) for p in pixels] == counts and all(p.dtype == torch.uint8 and p.ndim == 4 for p in pixels)
        return pixels if fits else None
    except Exception:  # absent, or damaged in any way: decode again
        return None


def _save_cached(cache: Path, pixels: list[torch.Tensor]) -> None:
    try:
        cache.parent.mkdir(exist_ok=True)
        save_atomically(cache, pixels)
    except OSError as error:
        print(f"note: decoded images are not cached ({error})", file=sys.stderr)
