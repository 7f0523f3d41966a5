"""How long the runs of a dry run would take: bash scripts/reproduce_cifar.sh --dry-run | python -m benchmarks.estimate.

Reads commands of main_prune_train.py, measures some training steps of each network and optimizer among them on this
machine, on random images of CIFAR's shape, and adds up the steps of 50,000 images an epoch. Evaluation, start and
compilation are not in it.
"""

import argparse
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch

from benchmarks.loop import BATCH, CLASSES, Loop, random_images
from benchmarks.report import measure
from experiment import flags as cli
from models import build_model
from prune import METHODS, Options
from utils.device import device_name, keep_freed_memory, pick_device, use_deterministic_kernels
from utils.errors import UsageError, usage_errors
from utils.precision import bf16_on_cpu, resolve_execution

IMAGES, TURNS = 50_000, 2


def step_seconds(network: tuple[str, int, float], optimizer: str, v2: bool, device: torch.device) -> float:
    """Median seconds of a training step at batch 128, precision as --precision auto takes it, not compiled."""
    steps = 100 if device.type == "cuda" else 3  # so that what an epoch ends in is little beside them
    images, (arch, depth, width) = random_images(steps * BATCH), network
    with tempfile.TemporaryDirectory() as scratch, usage_errors():
        kernels = bf16_on_cpu(build_model(arch, depth, CLASSES, width), (3, 32, 32))
        execution = resolve_execution("auto", "off", device, cpu_kernels=kernels)
        loop = Loop(device, execution, images, Path(scratch) / "run", optimizer, v2, network=network)
        return median(measure(TURNS, {"steps": loop.run}, device)["steps"]) / steps


def epochs_of(lines: Iterable[str]) -> Counter:
    """Epochs of all commands for each (architecture, depth, width), optimizer and whether it is SAM.v2.

    Raises:
        UsageError: a command that main_prune_train.py would not take.
    """
    epochs: Counter = Counter()
    for line in lines:
        command = shlex.split(line)
        if "main_prune_train.py" not in command:
            continue
        args, given = cli.parse(command[command.index("main_prune_train.py") + 1 :])
        cli.check(args, given)
        if args.batch_size != BATCH:
            raise UsageError(f"steps are measured at --batch-size {BATCH}, and a command has {args.batch_size}")
        trainings = 1 + (args.lth_rounds or Options().rounds) if METHODS[args.prune_method].tickets else 1
        epochs[(args.arch, args.depth, args.width), args.optmzr, args.sam_v2] += args.epochs * trainings
    return epochs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--gpus",
        type=cli.number(int, above=0),
        default=1,
        help="that share the runs; runs on one slow each other (%(default)s)",
    )
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    options = parser.parse_args(argv)
    try:
        device = pick_device(options.device)
        epochs = epochs_of(sys.stdin)
    except UsageError as error:
        parser.error(str(error))
    keep_freed_memory()
    use_deterministic_kernels(False)
    if not epochs:
        parser.error("no commands of main_prune_train.py on standard input: give it what a sweep's --dry-run prints")
    total = 0.0
    print(f"a training step on {device_name(device)}:")
    for (network, optimizer, v2), count in epochs.items():
        try:
            seconds = step_seconds(network, optimizer, v2, device)
        except UsageError as error:
            parser.error(str(error))
        total += count * seconds * IMAGES / BATCH
        arch, depth, width = network
        text = f"{arch}-{depth}, width {width:g}, {optimizer}{' v2' if v2 else ''}"
        print(f"  {text:<36} {1e3 * seconds:>8.1f} ms, {count:,} epochs", flush=True)
    hours = total / 3600 / options.gpus
    print(f"all of it: about {hours:,.0f} hours ({hours / 24:,.1f} days)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
