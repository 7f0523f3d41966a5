"""Pictures of the loss around trained networks: python -m analysis.loss_surface CKPT...

Along random directions that are normalised filter by filter (Li et al., "Visualizing the Loss FixedImagesLoss of Neural Nets",
NeurIPS 2018): every filter of a direction has the norm of the network's own filter, so that networks compare whatever
the scale of their weights. Biases and normalisation stay, and so do pruned weights: the direction is zero there. All
checkpoints get the same random numbers, images, range, colours and axes. Draws line.png, contour.png and surface.png and
writes the numbers behind them to surface.npz. Float32, batch norm in evaluation mode, no label smoothing.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis import surface_plots
from analysis.checkpoints import add_checkpoints, answer, open_checkpoint, writing
from analysis.hessian import SPLITS
from analysis.landscape import FixedImagesLoss, fixed_images, living
from analysis.results import label
from experiment.flags import number
from utils.device import pick_device
from utils.errors import UsageError
from utils.files import write_atomically
from utils.precision import resolve_execution, what_compilation_lacks


def filter_normalized(landscape: FixedImagesLoss, free: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction [P], each filter of the norm of the network's (Li et al. 2018, section 4).

    A filter is all weights that lead to one output channel or unit. Parameters of one dimension do not move.

    Args:
        free: bool [P]; the others do not move.
        generator: on the CPU: the same numbers on every device.
    """
    noise = torch.randn(len(landscape.weights), generator=generator).to(landscape.weights) * free
    parts = []
    for d, w in zip(
        landscape.parameters_of(noise).values(), landscape.parameters_of(landscape.weights).values(), strict=True
    ):
        if w.ndim < 2:
            parts.append(torch.zeros(w.numel(), dtype=w.dtype, device=w.device))
            continue
        d, w = d.flatten(1), w.flatten(1)
        norm = d.norm(dim=1, keepdim=True)
        scale = torch.where(norm > 0, w.norm(dim=1, keepdim=True) / norm, 0.0)  # a filter may be pruned altogether
        parts.append((d * scale).flatten())
    return torch.cat(parts)


def grid(landscape: FixedImagesLoss, directions: list[Tensor], axis: Tensor, progress: tqdm) -> np.ndarray:
    """Mean loss at w + sum of axis[i] * direction, over all combinations.

    Returns:
        float64 [len(axis)] for one direction; [len(axis), len(axis)] for two, the first along the columns.
    """
    losses = []
    for values in torch.cartesian_prod(*[axis] * len(directions)).view(-1, len(directions)).tolist():
        moved = landscape.weights.clone()
        for value, direction in zip(reversed(values), directions, strict=True):
            moved += value * direction
        losses.append(landscape.loss(moved)[0])
        progress.update()
    return np.array(losses).reshape([len(axis)] * len(directions))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.loss_surface",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoints(parser)
    add = parser.add_argument
    add("--dimensions", type=int, choices=(1, 2), nargs="+", default=(1, 2), help="line, plane (1 2)")
    add("--range", type=number(float, above=0), default=1.0, metavar="R",
        help="from -R to R, in norms of the filters (%(default)g)")  # fmt: skip
    add("--resolution", type=number(int, least=3, most=1001), default=21, metavar="N",
        help="points on an axis; made odd, so that the network itself is one (%(default)s)")  # fmt: skip
    add("--split", choices=SPLITS, default="train", help="(%(default)s)")
    add("--images", type=number(int, above=0), default=1000, metavar="N", help="(%(default)s)")
    add("--seed", type=number(int, least=0), default=0, help="of the directions (%(default)s)")
    add("--labels", nargs="+", metavar="TEXT", help="a title for each checkpoint (optimizer, rho, method, sparsity)")
    add("--output", type=Path, default=Path("loss_surface"), metavar="DIR", help="for the files (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    return answer(parser, parser.parse_args(argv), run)


def run(args: Namespace) -> None:
    if args.labels and len(args.labels) != len(args.checkpoints):
        raise UsageError(f"{len(args.labels)} --labels for {len(args.checkpoints)} checkpoints: give one for each")
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    half = args.resolution // 2
    axis = torch.arange(-half, half + 1, dtype=torch.float64) * (args.range / half)
    numbers: dict[str, np.ndarray] = {"axis": axis.numpy(), "checkpoints": np.array([str(p) for p in args.checkpoints])}
    opened = [open_checkpoint(path, args) for path in args.checkpoints]
    numbers["labels"] = np.array(args.labels or [label(vars(trained.args)) for trained, _ in opened])
    points = sum(len(axis) ** dimensions for dimensions in set(args.dimensions))
    execution = resolve_execution("fp32", compilation(args, device, points), device)
    with tqdm(total=points * len(opened), unit="point", desc="loss", disable=None) as progress:
        lines, planes = [], []
        for trained, model in opened:
            images = fixed_images(getattr(trained.dataset, args.split), args.images)
            inputs = trained.normalize(images.pixels.to(device)).contiguous(memory_format=torch.channels_last)
            landscape = FixedImagesLoss(model, inputs, images.labels.to(device), args.batch_size, execution)
            generator = torch.Generator().manual_seed(args.seed)
            free = living(model, trained.pruner.masks)
            directions = [filter_normalized(landscape, free, generator) for _ in range(2)]
            if 1 in args.dimensions:
                lines.append(grid(landscape, directions[:1], axis, progress))
            if 2 in args.dimensions:
                planes.append(grid(landscape, directions, axis, progress))
    numbers |= {name: np.stack(parts) for name, parts in {"line": lines, "plane": planes}.items() if parts}
    with writing(args.output):
        write_atomically(args.output / "surface.npz", lambda file: np.savez(file, **numbers))
        for path in surface_plots.draw(numbers, args.output):
            print(path)
    print(args.output / "surface.npz")


def compilation(args: Namespace, device: torch.device, points: int) -> str:
    """`auto` is on where a CPU has so many forward passes to do that compiling must be worth it."""
    if args.compile != "auto":
        return args.compile
    many = device.type == "cpu" and points * args.images > 100_000
    return "on" if many and not what_compilation_lacks(device) else "off"


if __name__ == "__main__":
    sys.exit(main())
