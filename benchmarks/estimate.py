"""Estimate how long the commands that a sweep's --dry-run prints would take: python -m benchmarks.estimate < COMMANDS.

Measures training steps of each network and optimizer among them on this machine, on random images of CIFAR's shape, and
adds up the steps of 50,000 images an epoch. Evaluation, start and compilation are not included.
"""

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.loop import BATCH, CLASSES, Loop, random_images
from experiment.checks import check
from experiment.config import parse_and_replay
from experiment.flags import number, resolve
from models import build_model
from prune import METHODS
from training.optim import OPTIMIZERS
from utils.device import device_name, keep_freed_memory, pick_device, use_deterministic_kernels
from utils.errors import UsageError, usage_errors
from utils.precision import bf16_on_cpu, resolve_execution

IMAGES = 50_000
SECONDS = 90.0  # for all measurements, so that with two imports of torch an estimate takes less than two minutes
MOST = 20  # measurements of a network and optimizer


def measure_step(
    network: tuple[str, int, float], optimizer: str, v2: bool, device: torch.device, seconds: float
) -> list[float]:
    """Measure training steps at batch 128, in the precision that --precision auto takes, not compiled.

    Returns:
        Seconds of a step, once for each measurement that fits into the time given. The first one, which also allocates
        memory, is left out where there is another.
    """
    steps = 100 if device.type == "cuda" else 1  # on a GPU what an epoch ends in would count beside one step
    arch, depth, width = network
    # TensorBoard's thread may still write when the directory goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, usage_errors():
        kernels = partial(bf16_on_cpu, build_model(arch, depth, CLASSES, width), (3, 32, 32))
        execution = resolve_execution("auto", "off", device, cpu_kernels=kernels)
        loop = Loop(
            device, execution, random_images(steps * BATCH), Path(scratch) / "run", optimizer, v2, network=network
        )
        began = time.perf_counter()
        samples: list[float] = []
        while not samples or (time.perf_counter() - began + steps * samples[-1] < seconds and len(samples) <= MOST):
            before = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # where the loop says what an epoch says
                loop.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples.append((time.perf_counter() - before) / steps)
    return samples[1:] or samples


def count_epochs(lines: Iterable[str]) -> Counter:
    """Count the epochs of all commands for each (architecture, depth, width), optimizer and whether it is SAM.v2.

    Steps in which two-step SAM does not perturb are steps of its base optimizer. All directions of SAM.v2 count as one.

    Raises:
        UsageError: a command that main_prune_train.py would not take, or whose steps are not those measured here.
    """
    epochs: Counter = Counter()
    for line in lines:
        command = shlex.split(line)
        if "main_prune_train.py" not in command:
            continue
        args, given = parse_and_replay(command[command.index("main_prune_train.py") + 1 :])
        check(args, given)
        args = resolve(args)
        if args.batch_size != BATCH:
            raise UsageError(f"steps are measured at --batch-size {BATCH}, and a command has {args.batch_size}")
        if not args.dataset.startswith("cifar"):
            raise UsageError(
                f"steps are measured on images like CIFAR's, not on --dataset {args.dataset}: time a run with --epochs 1"
            )
        if OPTIMIZERS[args.optmzr].rival:
            raise UsageError(f"steps of --optmzr {args.optmzr} are not measured: time a run with --epochs 1")
        if args.stem == "imagenet":
            raise UsageError(
                "steps are measured with the stem for CIFAR, not with --stem imagenet: time a run with --epochs 1"
            )
        trainings = 1 + args.lth_rounds if METHODS[args.prune_method].tickets else 1
        share = (args.train_images or IMAGES - args.val_split) / IMAGES  # of an epoch
        network, count = (args.arch, args.depth, args.width), args.epochs * trainings * share
        two_step = OPTIMIZERS[args.optmzr].sam and not args.sam_v2
        plain = count * (1 - (args.sam_until - args.sam_from) / args.sam_every) if two_step else 0
        epochs[network, args.optmzr, args.sam_v2] += count - plain
        if plain:
            epochs[network, args.optmzr.removesuffix("-sam"), False] += plain
    return epochs


def main(argv: list[str] | None = None, lines: Iterable[str] = sys.stdin) -> int:
    """Run the command line on commands of main_prune_train.py; other lines are skipped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__.split("\n\n")[0])
    count = number(int, above=0)
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument(
        "--gpus",
        type=count,
        default=1,
        metavar="N",
        help="GPUs that runs are spread over; runs on one GPU slow each other (%(default)s)",
    )
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    parser.add_argument("--seconds", type=number(float, above=0), default=SECONDS, help="to measure (%(default)g)")
    options = parser.parse_args(argv)
    try:
        device = pick_device(options.device)
        epochs = count_epochs(lines)
        if not epochs:
            raise UsageError("no commands on standard input: give it what a sweep's --dry-run prints")
        total = estimate(epochs, device, options.seconds)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    at_a_time = options.jobs if device.type == "cpu" else min(options.jobs, options.gpus)
    hours = total / 3600 / at_a_time
    print(f"all of it: about {hours:,.1f} hours ({hours / 24:,.1f} days), {at_a_time} at a time")
    return 0


def estimate(epochs: Counter, device: torch.device, seconds: float) -> float:
    """Measure and print a step of each network and optimizer; return the seconds of all their epochs together."""
    keep_freed_memory()
    use_deterministic_kernels(False)
    print(
        f"measuring training steps on {device_name(device)} for at most {seconds:.0f} s: batches of {BATCH} random images "
        f"like CIFAR's, {IMAGES:,} images an epoch, without evaluation, start and compilation",
        flush=True,
    )
    total, deadline = 0.0, time.perf_counter() + seconds
    for done, ((network, optimizer, v2), count) in enumerate(epochs.items()):
        share = (deadline - time.perf_counter()) / (len(epochs) - done)
        samples = measure_step(network, optimizer, v2, device, share)
        total += count * median(samples) * IMAGES / BATCH
        arch, depth, width = network
        name = f"{arch}{f'-{depth}' if depth else ''}, width {width:g}, {optimizer}{' v2' if v2 else ''}"
        print(
            f"  {name:<36} {1e3 * median(samples):>8.1f} ms a step (median of {len(samples)}), {f'{count:,.1f}'.removesuffix('.0')} epochs",
            flush=True,
        )
    return total


if __name__ == "__main__":
    sys.exit(main())
