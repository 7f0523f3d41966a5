"""The paper's CIFAR table from the runs of scripts/reproduce_cifar.sh: python -m analysis.paper_table DIR... > RESULTS.md.

A page in Markdown: where the figures come from, then for each network and data set a row for every sparsity and optimizer
and a column for every method: the paper's, and what else there is. A cell is the mean of the last epoch's test accuracy ±
its standard deviation over the finished runs, with their number; it is empty where nothing has finished.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from analysis.results import METRIC, read_runs, varying

METHODS = ("snip", "grasp", "synflow", "random", "set", "rigl", "mest", "lth")
OPTIMIZERS = ("sgd", "sgd SAM", "sgd SAM.v2")
SPARSITIES = (0.9, 0.95, 0.98)


def cell(runs: pd.DataFrame) -> str:
    """Raises ValueError where runs differ in more than the seed."""
    if runs.empty:
        return ""
    if differing := varying(runs):
        raise ValueError(
            f"runs of one cell ({', '.join(str(d) for d in runs['directory'][:2])}) differ in {', '.join(differing)}: name "
            "directories with one value"
        )
    accuracy = runs[METRIC]
    deviation = f" ± {accuracy.std():.2f}" if len(accuracy) > 1 else ""
    return f"{accuracy.mean():.2f}{deviation} ({len(accuracy)})"


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the finished runs of one network on one data set."""
    methods = _with_others(METHODS, runs["--prune_method"])
    rows = []
    for sparsity in sorted(_with_others(SPARSITIES, runs["--sparsity"].fillna(0.0))):
        for optimizer in _with_others(OPTIMIZERS, runs["optimizer"]):
            chosen = runs[(runs["--sparsity"].fillna(0.0) == sparsity) & (runs["optimizer"] == optimizer)]
            cells = {method: cell(chosen[chosen["--prune_method"] == method]) for method in methods}
            rows.append({"sparsity": f"{sparsity:g}", "optimizer": optimizer.removeprefix("sgd ")} | cells)
    return pd.DataFrame(rows)


def _with_others(known: tuple, found: pd.Series) -> list:
    return [*known, *sorted(set(found) - set(known))]


def page(runs: pd.DataFrame) -> str:
    """The whole page.

    Raises:
        ValueError: runs of several lengths, or of one cell that differ in more than the seed.
    """
    known = runs[runs["optimizer"].notna()]
    lengths = sorted(known["--epochs"].unique())
    if len(lengths) > 1:
        raise ValueError(f"there are runs of {' and '.join(map(str, lengths))} epochs: name directories of one length")
    counts = ", ".join(f"{count} {state}" for state, count in runs["state"].value_counts().items())
    named = {"command": "`bash scripts/reproduce_cifar.sh`, a run's own in its args.json"}
    for column in ("data", "commit", "device", "torch"):
        named[column] = ", ".join(sorted(known[column].dropna().unique())) or "unknown"
    parts = [
        f"# The paper's CIFAR table, {lengths[0]:g} epochs",
        f"Test accuracy (%) after the last epoch, mean ± standard deviation (runs). {len(runs)} runs: {counts}.",
        "\n".join(f"- {name}: {text}" for name, text in named.items()),
    ]
    finished = known[known["state"] == "finished"]
    groups = known.groupby(["--dataset", "--arch", "--depth", "--width"]).groups
    for dataset, arch, depth, width in groups:
        of_group = finished[
            (finished["--dataset"] == dataset) & (finished["--arch"] == arch) & (finished["--depth"] == depth)
            & (finished["--width"] == width)
        ]  # fmt: skip
        parts.append(f"## {arch}-{depth:g}, width {width:g}, on {dataset}")
        parts.append(table(of_group).to_markdown(index=False, disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.paper_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="of the sweep")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.directories)
        if METRIC not in runs:
            raise ValueError(f"none of the {len(runs)} runs has finished: launch the sweep again to finish it")
        print(page(runs), end="")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
