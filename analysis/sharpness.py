"""Measure how sharp the minima of trained networks are.

Prints, for each network, the loss, the top-1 accuracy, the largest eigenvalue of the Hessian, its trace with the
standard error, and how much the loss rises within a radius rho (SAM-sharpness, by several steps of projected ascent: a
lower bound of the maximum). All of that over the weights that are not pruned ("living") and over all weights, on the
same training and test images for every network, unless its seed chose the images that it was trained on: float32,
batch norm in evaluation mode, no augmentation, no label smoothing. Networks that differ only in their seed are
averaged. The JSON file has every figure, among them all eigenvalues with their residuals ||Hv - lambda v|| / |lambda|
and the rise after SAM's one step.
"""

import argparse
import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from analysis.checkpoints import add_checkpoints, find_checkpoints, open_checkpoint, smaller_batch, study_settings
from analysis.command import make_room_for, run_command, throttled, writing_to
from analysis.hessian import SPACES, SPLITS, Settings, measure
from analysis.labels import run_label
from analysis.text_table import mean_and_std_text, number_text, text_table
from experiment.flags import number, plain
from utils.device import pick_device
from utils.errors import UsageError, usage_errors
from utils.files import write_text_atomically

ERROR = "std. error"  # column of the trace's


@dataclass(frozen=True)
class Measured:
    """The sharpness of one network.

    Attributes:
        number: its place in the list of networks, from 1.
        seed: of its run.
        study: what it has in common with repetitions of its run by other seeds.
        figures: what `measure` returned.
    """

    number: int
    seed: int
    study: str
    figures: dict


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m analysis.sharpness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoints(parser)
    add = parser.add_argument
    add("--images", type=number(int, least=2), default=default.images, metavar="N",
        help="images of each split (%(default)s)")  # fmt: skip
    add("--splits", choices=SPLITS, nargs="+", default=SPLITS, help="images to measure on (train test)")
    add("--spaces", choices=SPACES, nargs="+", default=SPACES, help="weights to look at (living all)")
    add("--top", type=number(int, least=0), default=default.top, metavar="K", help="largest eigenvalues (%(default)s)")
    add("--tolerance", type=number(float, above=0, below=1), default=default.tolerance,
        help="relative residual at which an eigenvalue is accepted (%(default)g)")  # fmt: skip
    add("--trace-samples", type=number(int, least=0), default=default.trace_samples, metavar="N",
        help="random vectors for the trace; 0 for none (%(default)s)")  # fmt: skip
    add("--rhos", type=number(float, above=0), nargs="*", default=default.rhos, metavar="RHO",
        help="radii of SAM-sharpness (0.05 0.1)")  # fmt: skip
    add("--adaptive-rhos", type=number(float, above=0), nargs="*", default=default.adaptive_rhos, metavar="RHO",
        help="radii of adaptive SAM-sharpness (0.5 1)")  # fmt: skip
    add("--steps", type=number(int, above=0), default=default.steps, metavar="N", help="ascent steps (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="JSON file (sharpness.json beside the first checkpoint)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    return run_command(run, args, smaller_batch(args))


def run(args: Namespace) -> None:
    """Measure all networks; print a list of them, their figures, and means over seeds."""
    if args.trace_samples == 1:
        raise UsageError("--trace-samples has to be 0, or 2 and more: one sample has no standard error")
    if not args.top and args.tolerance != Settings().tolerance:
        raise UsageError("--tolerance is that of eigenvalues, and --top 0 asks for none: leave one of them out")
    if not (args.rhos or args.adaptive_rhos) and args.steps != Settings().steps:
        raise UsageError("--steps are those within a radius, and there is none: give --rhos, or leave it out")
    device = pick_device(args.device)
    checkpoints = find_checkpoints(args.checkpoints, args.arch)
    for path in checkpoints:
        open_checkpoint(path, args)  # all of them, before the first is measured
    output = args.output or checkpoints[0].parent / "sharpness.json"
    make_room_for(output)
    settings = Settings(
        args.images, tuple(args.splits), tuple(args.spaces), args.top, args.tolerance, args.trace_samples,
        tuple(args.rhos), tuple(args.adaptive_rhos), args.steps, args.batch_size,
    )  # fmt: skip
    records, networks, listing = [], [], []
    show = throttled(lambda text: print(text, file=sys.stderr, flush=True))
    for place, path in enumerate(checkpoints, 1):
        trained, model = open_checkpoint(path, args)
        with usage_errors():
            figures = measure(
                model, trained.pruner.masks, trained.dataset, trained.normalize, device, settings, args.compile,
                watch=partial(show, f"[{place}/{len(checkpoints)}] {path}, "),
            )  # fmt: skip
        about = {"checkpoint": str(path), "args": plain(trained.args), "epochs": trained.epochs}
        records.append(about | {"recalibrated_bn": args.recalibrate_bn} | figures)
        with writing_to(output):
            write_text_atomically(output, json.dumps(records, indent=2) + "\n")
        study = json.dumps([study_settings(trained), trained.epochs], sort_keys=True)
        networks.append(Measured(place, trained.args.seed, study, figures))
        listing.append(
            f"{place:>3}  {run_label(vars(trained.args))}, seed {trained.args.seed}, epoch {trained.epochs}: {path}"
        )
    print("\n".join(listing))
    print_tables(networks, settings)
    print(f"\n{output}")


def print_tables(networks: list[Measured], settings: Settings) -> None:
    """Print a table for each split and space of weights, and below it means over seeds, where there are any."""
    groups = over_seeds(networks)
    residuals = [
        eigenvalue["residual"]
        for network in networks
        for split in settings.splits
        for space in settings.spaces
        for eigenvalue in network.figures[split][space].get("eigenvalues", [])
    ]
    print("\nλ1: largest eigenvalue; std. error: of the trace; rho: rise of the loss within that radius, at least")
    if residuals:
        print(f"largest residual of an eigenvalue: {max(residuals):.1e}")
    for split in settings.splits:
        for space in settings.spaces:
            figures = {network.number: shown_figures(network.figures, split, space) for network in networks}
            rows = [
                {"": str(place)} | {name: number_text(value) for name, value in shown.items()}
                for place, shown in figures.items()
            ]
            print(f"\n{split} images, {space} weights\n\n{text_table(rows)}")
            means = []
            for group in groups:
                places = [network.number for network in group]
                names = [name for name in figures[places[0]] if name != ERROR]
                cells = {name: mean_and_std_text([figures[place][name] for place in places]) for name in names}
                means.append({"": ", ".join(map(str, places))} | cells)
            if means:
                print(f"\nmean ± standard deviation over seeds\n\n{text_table(means)}")


def shown_figures(results: dict, split: str, space: str) -> dict[str, float | None]:
    """Select the figures of `measure` that the tables show, by the names of their columns."""
    figures = results[split][space]
    shown = {"loss": results[split]["loss"], "top-1 (%)": results[split]["top1"]}
    if "eigenvalues" in figures:
        found = figures["eigenvalues"]
        shown["λ1"] = found[0]["value"] if found else None
    if "trace" in figures:
        shown |= {"trace": figures["trace"], ERROR: figures["trace_standard_error"]}
    for sam in figures["sam"]:
        shown[f"{'adaptive ' if sam['adaptive'] else ''}rho {sam['rho']:g}"] = sam["lower_bound"]
    return shown


def over_seeds(networks: list[Measured]) -> list[list[Measured]]:
    """Group networks that differ only in their seed and have come equally far; each group has each seed once."""
    groups: dict[str, list[Measured]] = {}
    for network in networks:
        groups.setdefault(network.study, []).append(network)
    return [group for group in groups.values() if len(group) == len({n.seed for n in group}) > 1]


if __name__ == "__main__":
    sys.exit(main())
