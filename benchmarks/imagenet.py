"""Say what a run of scripts/imagenet.sh would compute: images, operations and, at a given speed, hours.

python -m benchmarks.imagenet DIR IMAGES_PER_SECOND main_prune_train.py FLAG...
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from experiment.checks import check
from experiment.config import parse_and_replay
from experiment.flags import number, resolve
from imagedata.sources import EXTENSIONS
from models import build_model
from prune import METHODS, Pruner
from prune.flops import count_flops
from training.optim import OPTIMIZERS
from utils.errors import UsageError

RANDOM = METHODS["random"]  # whose densities stand for those of every method


def main(argv: list[str]) -> int:
    """Print one line for the flags of a run, and return an exit code."""
    if len(argv) < 3:
        print(f"error: scripts/imagenet.sh launches this: {__doc__.splitlines()[-1]}", file=sys.stderr)
        return 2
    directory, speed_text, _, *flags = argv
    try:
        speed = number(float, least=0)(speed_text)
        args, given = parse_and_replay(flags)
        check(args, given)
        args = resolve(args)
        if args.dataset != "imagefolder":
            raise UsageError(f"this counts the images of --dataset imagefolder, not of {args.dataset}")
        if args.sparsity_pattern != "unstructured" or args.sparsity_config:
            raise UsageError(
                "what --sparsity-pattern or --sparsity-config saves is not estimated: leave it out of the dry run"
            )
        with torch.device("meta"):
            side = args.image_size
            model = build_model(args.arch, args.depth, 1000, args.width, 3, (side, side), args.stem)
        shares = args.sparsity_distribution if args.sparsity_distribution in RANDOM.distributions else None
        counts = Pruner(model, "random", args.sparsity, shares, dense_layers=args.dense_layers).budget.counts(
            args.sparsity
        )
    except argparse.ArgumentTypeError as error:
        print(f"error: IMAGES_PER_SECOND {error}", file=sys.stderr)
        return 2
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trainings = 1 + args.lth_rounds if METHODS[args.prune_method].tickets else 1
    of_epoch = args.train_images or count_files(Path(directory) / "train") - args.val_split
    if of_epoch < 1:
        print(f"error: --val-split {args.val_split:,} leaves no image to train on: lower it", file=sys.stderr)
        return 2
    images = trainings * args.epochs * of_epoch
    flops = count_flops(model, (3, side, side))
    weights = dict(Pruner(model).masks.weights)
    density = {layer: kept / weights[layer].numel() for (layer,), kept in counts.items()}
    density = dict.fromkeys(flops.forward, 1.0) | density
    two_step = OPTIMIZERS[args.optmzr].sam and not args.sam_v2
    passes = 1 + (args.sam_until - args.sam_from) / args.sam_every if two_step else 1
    dense, sparse = (passes * images * each for each in (flops.dense_training, flops.train(density)))
    line = f"# {images:,} images, {dense:.2e} FLOPs as computed, {sparse:.2e} if zeros cost nothing"
    hours = f", {passes * images / speed / 3600:.1f} hours at {speed:g} images/s a pass" if speed else ""
    print(line + hours)
    return 0


def count_files(directory: Path) -> int:
    """Return the number of images below a directory."""
    return sum(name.lower().endswith(EXTENSIONS) for _, _, names in os.walk(directory) for name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
