"""Trained networks for the commands that look at them: how the command line names them, and how they are opened."""

import argparse
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from experiment.flags import DRAWN_BY_SEED, MAY_CHANGE_ON_RESUME, architecture, number, parse, plain
from experiment.trained_run import TrainedRun, open_run
from models.external import is_own_code
from training.batch_norm import recalibrated
from training.checkpoint import load_checkpoint
from utils.device import pick_device
from utils.errors import UsageError, usage_errors


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name networks and say how to compute with them."""
    parser.add_argument(
        "checkpoints",
        metavar="PATH",
        type=Path,
        nargs="+",
        help="a checkpoint.pt or best.pt, or a directory: every checkpoint.pt below it",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where the images are now (where the run had them)"
    )
    parser.add_argument(
        "--arch", type=architecture, nargs="+", default=(), metavar="FILE.py:FUNCTION",
        help="networks of your own again: a checkpoint alone never runs code",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="where to compute (%(default)s)")
    parser.add_argument(
        "--batch-size",
        type=number(int, above=0),
        default=250,
        metavar="N",
        help="images per forward pass (%(default)s)",
    )
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="(%(default)s)")
    parser.add_argument(
        "--recalibrate-bn", action="store_true", help="estimate batch norm's statistics anew, at the weights"
    )


def find_checkpoints(paths: Iterable[Path], archs: Iterable[str] = ()) -> list[Path]:
    """List the checkpoints that paths name: a file is one, a directory stands for every checkpoint.pt below it.

    Args:
        paths: files and directories.
        archs: networks of your own, of which one of the checkpoints has to be.

    Raises:
        UsageError: a directory without a checkpoint, or functions of which no checkpoint's network is.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        below = sorted(path.rglob("checkpoint.pt")) if path.is_dir() else [path]
        if not below:
            raise UsageError(f"there is no checkpoint.pt in or below '{path}': name a run's directory or one above it")
        for checkpoint in below:
            found.setdefault(checkpoint.resolve(), checkpoint)
    if archs and not any(named_again(str(load_checkpoint(path)["args"].get("arch")), archs) for path in found.values()):
        raise UsageError(f"--arch {' '.join(archs)} has no effect: no checkpoint's network is of it; leave it out")
    return list(found.values())


def open_checkpoint(path: Path, args: Namespace) -> tuple[TrainedRun, nn.Module]:
    """Open a checkpoint.

    Returns:
        What it holds, and its network, with batch norm's statistics as the arguments ask.

    Raises:
        UsageError: there is no such checkpoint, the images are not those of its run, or it is of a network of your own that
            --arch does not name.
    """
    device = pick_device(args.device)
    argv = ["--evaluate", str(path), *(["--data-dir", str(args.data_dir)] if args.data_dir else [])]
    checkpoint = load_checkpoint(path)
    arch = named_again(str(checkpoint["args"].get("arch")), args.arch)
    trained = open_run(checkpoint, *parse([*argv, *(["--arch", arch] if arch else [])]), device)
    if not trained.same_images:
        raise UsageError(f"the images are not those that '{path}' was trained on: give their directory with --data-dir")
    if not args.recalibrate_bn:
        return trained, trained.model
    with usage_errors():
        return trained, recalibrated(trained.model, trained.training_inputs(device))


def named_again(saved: str, archs: Iterable[str]) -> str | None:
    """Return which of the named functions a checkpoint's network is of: its own, or that of a file that has moved."""

    def without_directory(arch: str) -> str:
        return os.path.basename(arch) if is_own_code(arch) else arch

    matching = [arch for arch in archs if is_own_code(saved) and without_directory(arch) == without_directory(saved)]
    return saved if saved in matching else next(iter(matching), None)


def study_settings(trained: TrainedRun) -> dict:
    """Return what a run has in common with its repetitions by other seeds: flags, and images where no seed chose them."""
    args = plain(trained.args)
    own = any(args.get(name) for name in DRAWN_BY_SEED)
    return {k: v for k, v in args.items() if k not in MAY_CHANGE_ON_RESUME | {"seed", "compile"}} | {
        "images": None if own else trained.images
    }


def smaller_batch(args: Namespace) -> str:
    """Return what to try where a GPU is out of memory."""
    return f"--batch-size {max(1, args.batch_size // 2)}"
