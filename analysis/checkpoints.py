"""What commands that look at trained networks have in common: how they name them, open them and end."""

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from experiment import flags as cli
from experiment.build import Trained, open_trained
from experiment.flags import number
from training.batch_norm import recalibrated
from utils.device import pick_device
from utils.errors import TrainingError, UsageError, memory_errors, usage_errors


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the networks and say how to compute with them."""
    parser.add_argument("checkpoints", metavar="CKPT", type=Path, nargs="+", help="checkpoint.pt or best.pt of a run")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where the images are now (where the run had them)"
    )
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    parser.add_argument("--batch-size", type=number(int, above=0), default=250, metavar="N", help="(%(default)s)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="(%(default)s)")
    parser.add_argument(
        "--recalibrate-bn", action="store_true", help="with batch norm's statistics estimated anew at the weights"
    )


def open_checkpoint(path: Path, args: Namespace) -> tuple[Trained, nn.Module]:
    """What a checkpoint holds, and its network with the statistics of batch norm that the arguments want.

    Raises:
        UsageError: no such checkpoint, or other images than its run had.
    """
    device = pick_device(args.device)
    flags = ["--evaluate", str(path), *(["--data-dir", str(args.data_dir)] if args.data_dir else [])]
    trained = open_trained(*cli.parse(flags), device)
    if not trained.same_images:
        raise UsageError(f"the images are not those that '{path}' was trained on: name their place by --data-dir")
    if not args.recalibrate_bn:
        return trained, trained.model
    with usage_errors():
        return trained, recalibrated(trained.model, trained.training_inputs(device))


def answer(parser: ArgumentParser, args: Namespace, run: Callable[[Namespace], None]) -> int:
    """Run a command. Returns its exit code; bad input ends in the parser's way, with 2."""
    try:
        with memory_errors(f"--batch-size {max(1, args.batch_size // 2)}"):
            run(args)
    except UsageError as error:
        parser.error(str(error))
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn what cannot be written into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write to '{output}' ({error.strerror}): name another --output") from error
