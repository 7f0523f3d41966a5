"""Draw the loss around trained networks, along random directions that are normalised filter by filter.

Each filter of a direction has the norm of the network's own filter (Li et al., "Visualizing the Loss Landscape of Neural
Nets", NeurIPS 2018), so that networks compare whatever the scale of their weights: at 0.5 every filter has moved by half
its norm. Biases and normalisation stay, and so do pruned weights. All networks get the same random numbers, images, range,
colours and axes. Writes line, contour and surface (.png and .pdf), and the numbers behind them (surface.npz). Float32,
batch norm in evaluation mode, no label smoothing.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.checkpoints import add_checkpoints, find_checkpoints, open_checkpoint, smaller_batch
from analysis.command import make_writable, matplotlib_imports, progress, run_command, writing_to
from analysis.hessian import SPLITS
from analysis.labels import run_label
from analysis.landscape import FixedImagesLoss, fixed_images, living_weights, resolve_compilation
from experiment.flags import number
from prune.flops import count_flops
from utils.device import pick_device
from utils.errors import UsageError
from utils.files import write_atomically


def filter_normalized(loss: FixedImagesLoss, selected: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random direction [P] in which each filter has the norm of the network's (Li et al. 2018, section 4).

    A filter is all weights that lead to one output channel or unit. Parameters of one dimension do not move.

    Args:
        loss: holds the network's weights.
        selected: bool [P]; only these weights move.
        generator: on the CPU, for the same numbers on every device.
    """
    noise = torch.randn(len(loss.weights), generator=generator).to(loss.weights) * selected
    parts = []
    for d, w in zip(loss.parameters_of(noise).values(), loss.parameters_of(loss.weights).values(), strict=True):
        if w.ndim < 2:
            parts.append(torch.zeros(w.numel(), dtype=w.dtype, device=w.device))
            continue
        d, w = d.flatten(1), w.flatten(1)
        norm = d.norm(dim=1, keepdim=True)
        scale = torch.where(norm > 0, w.norm(dim=1, keepdim=True) / norm, 0.0)  # a whole filter may be pruned
        parts.append((d * scale).flatten())
    return torch.cat(parts)


def loss_grid(
    loss: FixedImagesLoss, directions: list[Tensor], axis: np.ndarray, advance: Callable[[], object]
) -> np.ndarray:
    """Evaluate the mean loss at w + sum of axis[i] * direction, for all combinations.

    Args:
        loss: the function.
        directions: one or two, [P] each.
        axis: the steps along a direction.
        advance: called after each point.

    Returns:
        float64 [len(axis)] for one direction; [len(axis), len(axis)] for two, the first along the columns.
    """
    losses = []
    for steps in np.ndindex(*[len(axis)] * len(directions)):
        moved = loss.weights.clone()
        for step, direction in zip(reversed(steps), directions, strict=True):
            moved += float(axis[step]) * direction
        losses.append(loss.loss(moved)[0])
        advance()
    return np.array(losses).reshape([len(axis)] * len(directions))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.loss_surface",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoints(parser)
    add = parser.add_argument
    add("--dimensions", type=int, choices=(1, 2), nargs="+", default=(1, 2), help="1 for a line, 2 for a plane (1 2)")
    add("--range", type=number(float, above=0), default=0.5, metavar="R",
        help="draw from -R to R, in norms of the filters (%(default)g)")  # fmt: skip
    add("--resolution", type=number(int, least=3, most=1001), default=21, metavar="N",
        help="points per axis; made odd, so that one of them is the network itself (%(default)s)")  # fmt: skip
    add("--split", choices=SPLITS, default="train", help="images to take the loss of (%(default)s)")
    add("--images", type=number(int, above=0), default=1000, metavar="N", help="number of images (%(default)s)")
    add("--seed", type=number(int, least=0), default=0, help="seed of the directions (%(default)s)")
    add("--labels", nargs="+", metavar="TEXT", help="one title per network (optimizer, rho, method, sparsity)")
    add("--output", type=Path, metavar="DIR", help="directory of the files (loss_surface beside the first checkpoint)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    return run_command(run, args, smaller_batch(args))


def run(args: Namespace) -> None:
    """Measure and draw the surfaces of all networks."""
    with matplotlib_imports():
        from analysis import surface_plots  # here: --help and the sentence above need no matplotlib
    checkpoints = find_checkpoints(args.checkpoints, args.arch)
    if args.labels and len(args.labels) != len(checkpoints):
        raise UsageError(f"{len(args.labels)} --labels for {len(checkpoints)} checkpoints: give one per checkpoint")
    output = args.output or checkpoints[0].parent / "loss_surface"
    labels, networks = _networks(args, checkpoints)
    make_writable(output)
    half = args.resolution // 2
    axis = np.arange(-half, half + 1) * (args.range / half)
    numbers = {
        "axis": axis, "labels": np.array(args.labels or labels), "checkpoints": np.array([str(p) for p in checkpoints])
    }  # fmt: skip
    points = sum(len(axis) ** dimensions for dimensions in set(args.dimensions))
    with progress(points * len(networks), "points") as advance:
        for name, dimensions in (("line", 1), ("plane", 2)):
            if dimensions in args.dimensions:
                grids = [loss_grid(loss, directions[:dimensions], axis, advance) for loss, directions in networks]
                numbers[name] = np.stack(grids)
    with writing_to(output):
        write_atomically(output / "surface.npz", lambda file: np.savez(file, allow_pickle=False, **numbers))
        files = surface_plots.draw(numbers, output)
    print("\n".join(map(str, [*files, output / "surface.npz"])))


def _networks(args: Namespace, checkpoints: list[Path]) -> tuple[list[str], list[tuple[FixedImagesLoss, list[Tensor]]]]:
    """Open the checkpoints; return a label per network, and its loss with two directions."""
    device = pick_device(args.device)
    points = sum((2 * (args.resolution // 2) + 1) ** dimensions for dimensions in set(args.dimensions))
    labels, networks = [], []
    for path in checkpoints:
        trained, model = open_checkpoint(path, args)
        images = fixed_images(getattr(trained.dataset, args.split), args.images)
        inputs = trained.normalize(images.load().to(device)).contiguous(memory_format=torch.channels_last)
        forward = count_flops(model, trained.dataset.image_shape).dense_training / 3  # a training step is three passes
        execution = resolve_compilation(args.compile, device, points * len(images) * forward)
        loss = FixedImagesLoss(model, inputs, images.labels.to(device), args.batch_size, execution)
        generator = torch.Generator().manual_seed(args.seed)
        selected = living_weights(model, trained.pruner.masks)
        labels.append((run_label(vars(trained.args)), f"seed {trained.args.seed}"))
        networks.append((loss, [filter_normalized(loss, selected, generator) for _ in range(2)]))
    names = [name for name, _ in labels]
    return [name if names.count(name) == 1 else f"{name}, {seed}" for name, seed in labels], networks


if __name__ == "__main__":
    sys.exit(main())
