"""Draw what SAM and one-step SAM do on a quadratic: the curvature that each can stand, and where each comes to rest.

On the loss h w^2 / 2 a step perturbs by rho d / |d|, computes g at the perturbed weight, and moves by momentum SGD:

    g = h (w + rho d / |d|)      v <- momentum v + g      w <- w - lr v

On the left the largest curvature h at which w stays bounded. There |d| is held, as it is where the noise of the batches
makes up most of a gradient, so that a step is linear and the limit exact. On the right the distance from the minimum at
which w comes to rest without any noise, where |d| vanishes.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

from analysis.command import make_writable, matplotlib_imports, run_command, writing_to
from utils.errors import UsageError

# d of each rule as a sign and what it is: the gradient at w, the one of the last step, or momentum.
RULES = {
    "SGD": (0, "gradient"),
    "two-step SAM": (1, "gradient"),
    "one-step, previous +": (1, "previous"),
    "one-step, previous -": (-1, "previous"),
    "one-step, momentum +": (1, "momentum"),
    "one-step, momentum - (MSAM)": (-1, "momentum"),
}


def step_matrix(rule: str, curvature: float, length: float, momentum: float) -> np.ndarray:
    """Return the step as a linear map of [w, v, last g], in units in which the learning rate is 1.

    Args:
        rule: a key of RULES.
        curvature: lr h.
        length: rho / (lr |d|), the perturbation in units of the step that d alone would make.
        momentum: of SGD.

    Returns:
        float64 [3, 3].
    """
    sign, kind = RULES[rule]
    w, v, last = np.eye(3)
    perturbation = sign * length * {"gradient": curvature * w, "previous": last, "momentum": v}[kind]
    g = curvature * (w + perturbation)
    v = momentum * v + g
    return np.array([w - v, v, g])


def largest_curvature(rule: str, length: float, momentum: float) -> float:
    """Return the largest lr h at which w stays bounded: every smaller one is stable too.

    For SGD this is 2 (1 + momentum). Arguments are those of `step_matrix`.
    """
    low, high = 0.0, 10.0
    for points in (200, 100, 100, 100, 100):  # each time between two points of the time before
        grid = np.linspace(low, high, points)[1:]
        steps = np.stack([step_matrix(rule, curvature, length, momentum) for curvature in grid])
        unstable = np.abs(np.linalg.eigvals(steps)).max(1) > 1 + 1e-9
        first = int(unstable.argmax())
        low, high = (grid[first - 1] if first else low), grid[first]
    return low


def resting_distances(
    rule: str, curvatures: np.ndarray, momentum: float, dimensions: int = 20, steps: int = 4000
) -> np.ndarray:
    """Return mean distances from the minimum over the last quarter of trainings without noise, in units of rho.

    Args:
        rule: a key of RULES.
        curvatures: [trainings], lr h of the sharpest direction; the others go down to a tenth of it in equal ratios.
        momentum: of SGD.
        dimensions: how many directions; w begins at 1 rho in each.
        steps: of a training.
    """
    sign, kind = RULES[rule]
    h = curvatures[:, None] * np.geomspace(1.0, 0.1, dimensions)
    w, v, g, distances = np.ones_like(h), np.zeros_like(h), np.zeros_like(h), []
    for _ in range(steps):
        d = {"gradient": h * w, "previous": g, "momentum": v}[kind]
        g = h * (w + sign * d / (np.linalg.norm(d, axis=1, keepdims=True) + 1e-12))
        v = momentum * v + g
        w = w - v
        distances.append(np.linalg.norm(w, axis=1))
    return np.mean(distances[-steps // 4 :], axis=0)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.quadratic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD (%(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("quadratic"), help="directory of the pictures (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(run, build_parser().parse_args(argv))


def run(args: Namespace) -> None:
    """Write the picture, and print its figures as a table."""
    if not 0 <= args.momentum < 1:
        raise UsageError(f"--momentum has to be at least 0 and less than 1, not {args.momentum:g}")
    with matplotlib_imports():
        from matplotlib.figure import Figure

        from analysis.figures import add_legend, line_style, save_figure
    make_writable(args.output)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths, rates = np.geomspace(0.01, 10, 31), np.geomspace(0.003, 0.3, 13)
    for number, rule in enumerate(RULES):
        style = line_style(number) | {"label": rule}
        left.plot(lengths, [largest_curvature(rule, length, args.momentum) for length in lengths], markevery=5, **style)
        right.plot(rates, resting_distances(rule, rates, args.momentum).clip(1e-3), markevery=3, **style)
    left.set(xscale="log", yscale="log", xlabel="rho / (lr |d|)", ylabel="largest stable lr h")
    right.set(
        xscale="log", yscale="log", xlabel="lr h of the sharpest direction", ylabel="distance from the minimum / rho"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    add_legend(figure, left.lines)
    with writing_to(args.output):
        files = save_figure(figure, args.output / "quadratic")
    print(table(args.momentum))
    print("\n".join(map(str, files)))


def table(momentum: float) -> str:
    """Return some points of both pictures as a Markdown table."""
    lengths, rate = (0.1, 0.3, 1.0, 3.0), 0.05
    rows = [
        ["rule", *(f"rho = {length:g} lr |d|" for length in lengths), f"rests at (lr h = {rate:g})"],
        ["---"] * (len(lengths) + 2),
    ]
    for rule in RULES:
        limits = [f"{largest_curvature(rule, length, momentum):.2f}" for length in lengths]
        rows.append([rule, *limits, f"{resting_distances(rule, np.array([rate]), momentum)[0]:.2f} rho"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
