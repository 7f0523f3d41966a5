"""How sharp the minima are that trained networks lie in: python -m analysis.sharpness CKPT...

The largest eigenvalues of the Hessian with their residuals ||Hv - lambda v|| / |lambda|, its trace with the standard error,
and how much the loss rises within a radius rho (SAM-sharpness): after SAM's one step, and after several steps of projected
ascent, a lower bound of the maximum. Over the weights that are not pruned ("living") and over all of them, on the same
images of the training and of the test set for every checkpoint: float32, batch norm in evaluation mode, no augmentation,
no label smoothing. Networks that differ only in their seed are a line of the last table.
"""

import argparse
import json
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pandas as pd

from analysis import hessian as sharpness
from analysis.checkpoints import add_checkpoints, answer, open_checkpoint, writing
from analysis.hessian import SPACES, SPLITS, Settings
from analysis.results import label
from experiment.build import Trained
from experiment.flags import number
from experiment.run_directory import FREE, plain
from utils.device import pick_device
from utils.errors import UsageError, usage_errors
from utils.files import write_text_atomically


def build_parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m analysis.sharpness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoints(parser)
    add = parser.add_argument
    add("--images", type=number(int, least=2), default=default.images, metavar="N", help="of a split (%(default)s)")
    add("--splits", choices=SPLITS, nargs="+", default=SPLITS, help="(train test)")
    add("--spaces", choices=SPACES, nargs="+", default=SPACES, help="weights to look at (living all)")
    add("--top", type=number(int, least=0), default=default.top, metavar="K", help="eigenvalues (%(default)s)")
    add(
        "--tolerance",
        type=number(float, above=0, below=1),
        default=default.tolerance,
        help="of residuals (%(default)g)",
    )
    add("--trace-samples", type=number(int, least=0), default=default.trace_samples, metavar="N", help="(%(default)s)")
    add("--rhos", type=number(float, above=0), nargs="*", default=default.rhos, metavar="RHO", help="(0.05 0.1)")
    add("--adaptive-rhos", type=number(float, above=0), nargs="*", default=default.adaptive_rhos, metavar="RHO",
        help="(0.5 1)")  # fmt: skip
    add("--steps", type=number(int, above=0), default=default.steps, metavar="N", help="of ascent (%(default)s)")
    add("--output", type=Path, default=Path("sharpness.json"), metavar="FILE", help="all figures (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    return answer(parser, parser.parse_args(argv), run)


def run(args: Namespace) -> None:
    if args.trace_samples == 1:
        raise UsageError("--trace-samples has to be 0, or 2 and more: one sample has no standard error")
    with writing(args.output), tempfile.TemporaryFile(dir=args.output.parent):
        pass  # what cannot be written is known before hours of measuring
    device = pick_device(args.device)
    names = {field.name for field in fields(Settings)}
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k in names})
    measured, rows = [], []
    for path in args.checkpoints:
        open_checkpoint(path, args)  # all of them, before the first is measured
    for path in args.checkpoints:
        began = time.perf_counter()
        trained, model = open_checkpoint(path, args)
        with usage_errors():
            figures = sharpness.measure(
                model, trained.pruner.masks, trained.dataset, trained.normalize, device, settings, args.compile,
                watch=lambda what, path=path: print(f"{path}: {what}", file=sys.stderr, flush=True),
            )  # fmt: skip
        about = {"checkpoint": str(path), "args": plain(trained.args), "epochs": trained.epochs}
        measured.append(about | {"recalibrated_bn": args.recalibrate_bn} | figures)
        with writing(args.output):
            write_text_atomically(args.output, json.dumps(measured, indent=2) + "\n")
        rows += table_rows(str(path), trained, figures)
        print(f"{path}: {time.perf_counter() - began:,.0f} s", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    for (split, space), part in table.groupby(["split", "weights"], sort=False):
        print(f"\n{split} images, {space} weights\n")
        print(shown(part.drop(columns=["split", "weights", "settings"])))
    means = over_seeds(table)
    if not means.empty:
        print("\nmean ± standard deviation over seeds\n")
        print(shown(means))
    print(f"\n{args.output}")


def table_rows(name: str, trained: Trained, results: dict) -> list[dict]:
    """A row for each split and space: what the printed tables show."""
    rows, args = [], trained.args
    studied = {k: v for k, v in plain(args).items() if k not in FREE | {"seed", "compile"}} | {"images": trained.images}
    for split in results["settings"]["splits"]:
        for space in results["settings"]["spaces"]:
            figures = results[split][space]
            row = {
                "checkpoint": name,
                "run": label(vars(args)),
                "epochs": trained.epochs,
                "seed": args.seed,
                "split": split,
                "weights": space,
            }
            row |= {"settings": json.dumps(studied)}
            row |= {"loss": results[split]["loss"], "top-1 (%)": results[split]["top1"]}
            for place, eigenvalue in enumerate(figures.get("eigenvalues", []), 1):
                row[f"λ{place}"] = eigenvalue["value"]
            if figures.get("eigenvalues"):
                row["largest residual"] = max(e["residual"] for e in figures["eigenvalues"])
            if "trace" in figures:
                row |= {"trace": figures["trace"], "its s.e.": figures["trace_standard_error"]}
            for sam in figures["sam"]:
                rho = f"{'adaptive ' if sam['adaptive'] else ''}rho {sam['rho']:g}"
                row |= {f"{rho}, one step": sam["one_step"], f"{rho}, max at least": sam["lower_bound"]}
            rows.append(row)
    return rows


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """`mean ± std` of every figure over the seeds of a run, where there are two or more, each once.

    Runs are the same if they differ in nothing but the seed and have come equally far.
    """
    keys = ["split", "weights", "run", "epochs", "settings"]
    figures = [name for name in table if name not in [*keys, "checkpoint", "seed", "its s.e.", "largest residual"]]
    groups = table.groupby(keys, sort=False)
    once = groups["seed"].agg(lambda seeds: len(seeds) > 1 and seeds.is_unique)
    means, deviations = groups[figures].mean(), groups[figures].std()
    text = means.map("{:.4g}".format) + " ± " + deviations.map("{:.2g}".format)
    text.insert(0, "seeds", groups.size())
    return text[once].reset_index().drop(columns="settings")


def shown(table: pd.DataFrame) -> str:
    text = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    return text.to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
