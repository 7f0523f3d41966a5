"""Images/s of --dataset imagefolder, by number of workers, against a DataLoader of the usual script for ImageNet.

The usual script reads with torchvision's ImageFolder and Pillow, crops, mirrors and normalises each image in float32.
Both give the same number of batches in turns, in one process; a ratio above 1 means that this repository is faster. The
first line is the limit: decoding alone, on one core. The last two are for images in memory: what part of a training step
of ResNet-20 on the CPU making its batch takes, for 32 and 64 pixels. Without --data-dir JPEG files of noisy colour fields are written,
500x375 pixels.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from experiment.flags import number
from imagedata.augment import Augmentation, Normalize
from imagedata.files import DEVIATION, JPEG, MEAN, ImageFiles, decode_any, decode_jpeg
from imagedata.images import Images
from imagedata.loaders import TrainLoader
from imagedata.sources import load_dataset
from models import build_model
from utils.errors import UsageError
from utils.precision import Execution


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="train/<class>/* and val/<class>/* (written)")
    parser.add_argument("--image-size", type=number(int, above=0), default=224, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--batch-size", type=number(int, above=0), default=32, metavar="N", help="(%(default)s)")
    parser.add_argument("--batches", type=number(int, above=0), default=24, metavar="N", help="in a turn (%(default)s)")
    parser.add_argument("--turns", type=number(int, above=0), default=5, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--workers",
        type=number(int, least=0),
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="numbers of worker processes to compare (0 1 2)",
    )
    args = parser.parse_args(argv)
    try:
        with photos(args.data_dir) as directory:
            compare(directory, args)
        for side in (32, 64):
            print(f"{side} pixels in memory: making a batch takes {share_of_loading(side, args.turns):.1%} of a step")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def photos(directory: Path | None) -> Iterator[Path]:
    """Yield the directory that is named, or one of written files that goes afterwards."""
    if directory:
        yield directory
        return
    chance = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        for split, count in (("train", 64), ("val", 4)):
            for name in ("a", "b"):
                (Path(place) / split / name).mkdir(parents=True)
                for index in range(count):
                    coarse = Image.fromarray(chance.integers(0, 256, (8, 11, 3), dtype=np.uint8))
                    field = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
                    pixels = (field + chance.integers(-24, 25, field.shape)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(Path(place) / split / name / f"{index}.jpg", quality=90)
        yield Path(place)


def compare(directory: Path, args: argparse.Namespace) -> None:
    """Print images/s of decoding, and of both pipelines by number of workers."""
    torch.set_num_threads(1)
    images = load_dataset("imagefolder", directory, args.image_size).train
    assert isinstance(images, ImageFiles)
    files = [(images.root / Path(images.name(index).decode())).read_bytes() for index in range(min(64, len(images)))]
    if not all(content.startswith(JPEG) for content in files):
        raise UsageError(f"'{directory}' has images that are not JPEGs, which are what this measures: name others")
    speeds: dict[str, list[float]] = {"torchvision": [], "Pillow": []}
    for _ in range(args.turns):
        for name, decode in (("torchvision", decode_jpeg), ("Pillow", decode_any)):
            began = time.perf_counter()
            for content in files:
                decode(content)
            speeds[name].append(len(files) / (time.perf_counter() - began))
    fast, other = (statistics.median(speeds[name]) for name in ("torchvision", "Pillow"))
    print(f"decoding alone, one core: {fast:,.0f} images/s by torchvision, {other:,.0f} by Pillow ({fast / other:.2f})")
    for workers in args.workers:
        rates: dict[str, list[float]] = {"here": [], "the usual way": []}
        for turn in range(args.turns):
            ways = {
                "here": partial(pipeline, images, args, workers, turn),
                "the usual way": partial(usual_script, directory, args, workers),
            }
            for way, begin in list(ways.items())[:: -1 if turn % 2 else 1]:
                rates[way].append(images_per_second(begin(), args.batches))
        ratios = sorted(a / b for a, b in zip(*rates.values(), strict=True))
        medians = ", ".join(f"{statistics.median(rate):,.0f} images/s {way}" for way, rate in rates.items())
        print(
            f"{workers} workers: {medians}, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def images_per_second(batches: Iterator[torch.Tensor], number: int) -> float:
    """Return how fast batches come. Their workers end as this returns, if nothing else holds the iterator."""
    next(batches)  # the start of the workers
    began = time.perf_counter()
    count = sum(len(next(batches)) for _ in range(number))
    return count / (time.perf_counter() - began)


def share_of_loading(side: int, turns: int, batch_size: int = 128) -> float:
    """Return the part of a training step on a CPU that making the batch takes, in the median turn."""
    device, chance = torch.device("cpu"), torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4 * batch_size, side, side, 3), dtype=torch.uint8, generator=chance)
    images = Images(pixels, torch.arange(len(pixels)) % 10)
    loader = TrainLoader(
        images, Augmentation(len(images), batch_size, 0, pad=4, flip=True), 10, Normalize(MEAN, DEVIATION, device), device,
        0, Execution(),
    )  # fmt: skip
    model = build_model("resnet", 20, 10).to(memory_format=torch.channels_last)
    shares = []
    for step in range(turns + 1):
        began = time.perf_counter()
        batch = loader.batch(step)
        made = time.perf_counter()
        torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        shares.append((made - began) / (time.perf_counter() - began))
    return statistics.median(shares[1:])


def pipeline(images: ImageFiles, args: argparse.Namespace, workers: int, turn: int) -> Iterator[torch.Tensor]:
    """Return the inputs of one epoch after the other, as training sees them."""
    device = torch.device("cpu")
    loader = TrainLoader(
        images, Augmentation(len(images), args.batch_size, turn), int(images.labels.max()) + 1,
        Normalize(MEAN, DEVIATION, device), device, workers, Execution(),
    )  # fmt: skip
    return (loader.batch(step).inputs for step in range(10**9))


def usual_script(directory: Path, args: argparse.Namespace, workers: int) -> Iterator[torch.Tensor]:
    """Return the inputs that the usual script for ImageNet sees, epoch after epoch."""
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(args.image_size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([level / 255 for level in MEAN], [level / 255 for level in DEVIATION]),
    ]
    folder = datasets.ImageFolder(str(directory / "train"), transforms.Compose(steps))
    order: Iterable[int] = (index % len(folder) for index in range(10**9))
    loader: DataLoader = DataLoader(folder, args.batch_size, sampler=order, num_workers=workers)  # type: ignore[arg-type]
    return (inputs for inputs, _ in loader)


if __name__ == "__main__":
    sys.exit(main())
