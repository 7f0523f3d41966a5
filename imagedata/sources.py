"""Where images come from: torchvision's data sets, folders of image files, or the digits that ship with scikit-learn."""

import contextlib
import fcntl
import hashlib
import math
import os
import pickle
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from imagedata.files import ImageFiles
from imagedata.images import Dataset, Images
from utils.device import memory_size
from utils.distributed import complain
from utils.errors import UsageError
from utils.files import load_whole, save_atomically, write_atomically

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGENET_SIDE = 224  # pixels, as is usual for ImageNet


def load_dataset(name: str, data_dir: Path | None = None, image_size: int | None = None) -> Dataset:
    """Load a data set into memory.

    Args:
        name: a key of DATASETS.
        data_dir: where its files are, or are downloaded to.
        image_size: side in pixels that folders bring images to.

    Raises:
        UsageError: data that is not there, cannot be read, or does not fit together.
    """
    return DATASETS[name].load(data_dir, image_size)


def is_at_hand(name: str, data_dir: Path | None = None) -> bool:
    """Return whether `load_dataset` downloads nothing; what it finds may still not be readable."""
    source = DATASETS[name].load
    if not isinstance(source, Downloaded):
        return True
    from torchvision import datasets

    try:
        for chosen in source.splits:
            getattr(datasets, source.name)(data_dir or Path("data"), **chosen)
    except (OSError, RuntimeError, EOFError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Source:
    """A data set: how it is loaded, and what is known of it before that.

    Attributes:
        load: from its directory and `image_size`, each None where it was not given, to the data set.
        classes, channels: None where the files decide.
        side: of its images, in pixels; what files of any size are brought to. None where the files decide.
        own_files: whether it is a folder of the reader's own images, which `image_size` may resize.
        takes_directory: whether there is a directory to name.
        policies: which of torchvision's policies AutoAugment takes.
    """

    load: Callable[[Path | None, int | None], Dataset]
    classes: int | None = None
    channels: int | None = None
    side: int | None = None
    own_files: bool = False
    takes_directory: bool = True
    policies: str = "IMAGENET"


@dataclass(frozen=True)
class Downloaded:
    """A data set of torchvision, which it downloads on first use and verifies by checksum.

    Attributes:
        name: of torchvision's class.
        title: for people.
        splits: arguments for training and test images.
        labels: attribute that holds them.
        pad, flip: see Dataset.
        channels_first: the order in which it keeps its pixels.
    """

    name: str
    title: str
    pad: int
    flip: bool
    splits: tuple[dict, dict] = ({"train": True}, {"train": False})
    labels: str = "targets"
    channels_first: bool = False

    def __call__(self, data_dir: Path | None, image_size: int | None) -> Dataset:
        """Load it. Raises UsageError where it is not there and cannot be downloaded."""
        from torchvision import datasets  # here: two seconds, for whoever asks for --help or has mistyped a flag

        cls, root = getattr(datasets, self.name), data_dir or Path("data")
        if hasattr(tarfile, "data_filter"):  # from Python 3.10.12 and 3.11.4 on; before, the checksum alone guards
            tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # torchvision names none
        splits = []
        for chosen in self.splits:
            try:
                with contextlib.redirect_stdout(sys.stderr), _one_process_at_a_time(root):
                    split = cls(root, **chosen, download=True)
            except (OSError, RuntimeError, EOFError, ValueError, tarfile.TarError, pickle.UnpicklingError) as error:
                raise UsageError(
                    f"{self.title} is not in '{root}' and could not be downloaded ({error}): connect to the network once, "
                    f"put {self._files(cls, root)} there, name the place that has it by --data-dir, or train without one on --dataset digits or folder"
                ) from error
            pixels = torch.as_tensor(split.data)
            if self.channels_first:
                pixels = pixels.permute(0, 2, 3, 1).contiguous()
            pixels = pixels if pixels.ndim == 4 else pixels[..., None]
            splits.append(Images(pixels, torch.as_tensor(getattr(split, self.labels)).long()))
        classes = getattr(split, "classes", [str(label) for label in range(10)])
        return Dataset(splits[0], splits[1], classes=list(classes), pad=self.pad, flip=self.flip)

    def _files(self, cls: Any, root: Path) -> str:
        """Name the files that could be put by hand where the data set is looked for."""
        if hasattr(cls, "filename"):
            return f"its '{cls.filename}'"
        if hasattr(cls, "split_list"):
            return " and ".join(f"'{cls.split_list[chosen['split']][1]}'" for chosen in self.splits)
        return f"its files, unpacked, as '{self.name}/raw/*-ubyte'"


@contextlib.contextmanager
def _one_process_at_a_time(root: Path) -> Iterator[None]:
    """Have other processes wait that look for a data set there: torchvision downloads and unpacks in place."""
    parents = root.absolute().parents  # root itself may be made meanwhile
    try:
        place = os.open(next(parent for parent in parents if parent.is_dir()), os.O_RDONLY)
    except OSError:  # one that can be entered and not read
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def tiny_imagenet(data_dir: Path | None, image_size: int | None) -> Dataset:
    """Load TinyImageNet as its archive unpacks: train/<class>/images/* and val/images/* with val/val_annotations.txt.

    Decoded once and cached, as a `folder` is. Its 10,000 validation images are for testing; its test images have no labels.
    """
    if data_dir is None:
        raise UsageError(
            "--dataset tinyimagenet needs --data-dir DIR, the 'tiny-imagenet-200' that its archive unpacks to"
        )
    train = _list_images(data_dir / "train")
    annotations = data_dir / "val" / "val_annotations.txt"
    try:
        lines = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
        labels = [train.classes.index(line[1]) for line in lines]
        if not lines:
            raise ValueError("it is empty")
    except (OSError, UnicodeDecodeError, IndexError, ValueError) as error:
        raise UsageError(
            f"'{annotations}' does not say the class of each image ({error}): --data-dir has to be the 'tiny-imagenet-200' that "
            "the archive unpacks to"
        ) from error
    paths = [os.path.join(data_dir, "val", "images", line[0]) for line in lines]
    return _decoded(data_dir, [train, _Files(train.classes, paths, labels)], "val", image_size)


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
    _refuse_other_classes(data_dir, splits[0].classes, splits[1].classes, test)
    _tell_of_few(data_dir / "train", splits[0].classes, splits[0].labels)
    return _decoded(data_dir, splits, test, image_size)


def image_folder(data_dir: Path | None, image_size: int | None) -> Dataset:
    """List DIR/train/<class>/* and DIR/val/<class>/* (or DIR/test), whose images are decoded when batches need them.

    The lists are cached in DIR/.listed and made anew where a directory has changed.
    """
    if data_dir is None:
        raise UsageError("--dataset imagefolder needs --data-dir DIR with DIR/train/<class>/* and DIR/val/<class>/*")
    test = next((name for name in ("val", "test") if os.path.isdir(data_dir / name)), "val")
    splits = [listed(data_dir / name, data_dir / ".listed" / f"{name}.pt") for name in ("train", test)]
    _refuse_other_classes(data_dir, splits[0]["classes"], splits[1]["classes"], test)
    _tell_of_few(data_dir / "train", splits[0]["classes"], splits[0]["labels"])
    images = [
        ImageFiles(
            data_dir / name, split["names"].numpy(), split["ends"].numpy(), torch.arange(len(split["ends"])),
            split["labels"], split["sizes"].numpy(), image_size or IMAGENET_SIDE,
        )
        for name, split in zip(("train", test), splits, strict=True)
    ]  # fmt: skip
    return Dataset(images[0], images[1], classes=splits[0]["classes"], pad=0, flip=False)


def listed(directory: Path, cache: Path) -> dict:
    """Return classes, and names, their ends, sizes and labels of the images of a directory, by class.

    Args:
        directory: has a directory for each class.
        cache: where the list is kept. It counts as long as no directory has changed; a file that was written anew in place
            keeps its old size there.
    """
    try:
        known = load_whole(cache)
        if all(os.stat(f"{directory}{place}").st_mtime_ns == when for place, when in known["places"].items()):
            return known
    except Exception:  # absent, damaged, or of directories that are gone: list again
        pass
    classes = _list_classes(directory)
    names: list[bytes] = []
    sizes: list[int] = []
    labels: list[int] = []
    places, root = {"": os.stat(directory).st_mtime_ns}, os.fsencode(directory)
    for label, name in enumerate(classes):
        before = len(names)
        for place, _, files in _places_below(directory / name):
            places[place[len(str(directory)) :]] = os.stat(place).st_mtime_ns
            for file in files:
                path = os.fsencode(os.path.join(place, file))
                names.append(path[len(root) + 1 :])
                try:
                    sizes.append(os.stat(path).st_size)
                except OSError as error:
                    what = f"'{os.fsdecode(path)}' is not a readable image ({error.strerror})"
                    raise UsageError(f"{what}: mend or remove it") from error
        _refuse_empty(directory, name, len(names) - before)
        labels += [label] * (len(names) - before)
    ends = np.cumsum(np.fromiter(map(len, names), dtype=np.int64))
    found = {
        "classes": classes,
        "places": places,
        "names": torch.from_numpy(np.frombuffer(bytearray(b"".join(names)), dtype=np.uint8)),
        "ends": torch.from_numpy(ends),
        "sizes": torch.tensor(sizes),
        "labels": torch.tensor(labels),
    }
    try:
        cache.parent.mkdir(exist_ok=True)
        save_atomically(cache, found)
    except OSError as error:
        print(f"note: the list of images is not cached ({error})", file=sys.stderr)
    return found


def _refuse_other_classes(data_dir: Path, train: list[str], test: list[str], name: str) -> None:
    if train != test:
        odd = sorted(set(train) ^ set(test))
        raise UsageError(
            f"'{data_dir}/train' and '{data_dir}/{name}' have different classes: '{odd[0]}' is in one only"
        )


def _tell_of_few(directory: Path, classes: list[str], labels: Sequence[int] | torch.Tensor) -> None:
    """Warn of what trains but cannot be meant: one class, or a class of one image."""
    if len(classes) == 1:
        complain(f"warning: '{directory}' has one class, '{classes[0]}': there is nothing to tell apart", alike=True)
    counts = torch.as_tensor(labels).bincount(minlength=len(classes))
    single = [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 1]
    if single:
        others = f" and {len(single) - 1} other classes" if single[1:] else ""
        complain(f"warning: '{single[0]}'{others} in '{directory}' has one image", alike=True)


def _decoded(data_dir: Path, splits: list["_Files"], test: str, image_size: int | None) -> Dataset:
    """Return the data set of these files, decoded once and cached in DIR/.decoded."""
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


# fmt: off
DATASETS = {
    "cifar10": Source(Downloaded("CIFAR10", "CIFAR-10", pad=4, flip=True), 10, 3, 32, policies="CIFAR10"),
    "cifar100": Source(Downloaded("CIFAR100", "CIFAR-100", pad=4, flip=True), 100, 3, 32, policies="CIFAR10"),
    "mnist": Source(Downloaded("MNIST", "MNIST", pad=2, flip=False), 10, 1, 28),
    "fashionmnist": Source(Downloaded("FashionMNIST", "FashionMNIST", pad=2, flip=True), 10, 1, 28),
    "svhn": Source(Downloaded(
        "SVHN", "SVHN", pad=4, flip=False, splits=({"split": "train"}, {"split": "test"}), labels="labels",
        channels_first=True,
    ), 10, 3, 32, policies="SVHN"),
    "tinyimagenet": Source(tiny_imagenet, 200, 3, 64),
    "folder": Source(folder, own_files=True),
    "imagefolder": Source(image_folder, side=IMAGENET_SIDE, own_files=True),
    "digits": Source(digits, 10, 1, 8, takes_directory=False),
}
# fmt: on


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
    files = _Files(_list_classes(directory), [], [])
    for label, name in enumerate(files.classes):
        found = [os.path.join(place, file) for place, _, names in _places_below(directory / name) for file in names]
        _refuse_empty(directory, name, len(found))
        files.paths.extend(found)
        files.labels.extend([label] * len(found))
    return files


def _list_classes(directory: Path) -> list[str]:
    try:
        classes = sorted(
            entry.name for entry in os.scandir(directory) if entry.is_dir() and not _is_left_over(entry.name)
        )
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        if not directory.is_dir():
            reason = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise UsageError(f"'{directory}' {reason}: --data-dir needs train/<class>/* and test/<class>/*") from error
    if not classes:
        raise UsageError(
            f"'{directory}' has no folder for each class: --data-dir needs train/<class>/* and test/<class>/*"
        )
    return classes


def _refuse_empty(directory: Path, name: str, count: int) -> None:
    if not count:
        raise UsageError(f"'{directory}' has a class without an image, '{name}': put some there, or remove it")


def _places_below(directory: Path) -> list[tuple[str, list[str], list[str]]]:
    """Return a directory and those below it, sorted, each with its directories and its images.

    Links are followed, except those that lead back to a directory on the way to them.

    Raises:
        UsageError: one of them cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"'{error.filename}' cannot be read ({error.strerror}): mend its permissions, or remove it")

    places = []
    real = Path(os.path.realpath(directory))
    inside = {str(directory): {str(real), *map(str, real.parents)}}  # of each directory: itself and those around it
    for place, folders, files in os.walk(directory, onerror=refuse, followlinks=True):
        around = inside.pop(place)
        below = {name: os.path.join(place, name) for name in folders if not _is_left_over(name)}
        targets = {name: os.path.realpath(path) for name, path in below.items()}
        folders[:] = [name for name in below if targets[name] not in around]
        inside.update((below[name], around | {targets[name]}) for name in folders)
        images = [name for name in sorted(files) if name.lower().endswith(EXTENSIONS) and not _is_left_over(name)]
        places.append((place, folders, images))
    return sorted(places)


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
        write_atomically(cache, lambda file: torch.save(pixels, file))  # they may be larger than memory
    except (OSError, RuntimeError, MemoryError) as error:  # of torch's writer, where a disk is full
        print(f"note: decoded images are not cached ({error})", file=sys.stderr)
