"""Tables and pictures of a study's runs: python -m analysis.summarize DIR...

Runs that differ in nothing but their seed are a line: mean and standard deviation of the last epoch's test accuracy with
the number of seeds. The best line of each setting is marked. Runs that did not finish are counted and listed, and are in
no mean. The paired comparison takes, seed by seed, the base optimizer's accuracy from SAM's.
"""

import argparse
import math
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import t as student

from analysis import plots
from analysis.results import METRIC, read_runs, varying
from utils.files import write_text_atomically

RHO = "--sam_rho"


def summary(runs: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """A row for each combination of optimizer and settings.

    Returns:
        The settings' columns, `mean` and `std` (percent; of one run there is no std), `runs` in them, `unfinished` ones
        (incomplete or failed), and `best`: whether no other optimizer or rho with the same other settings has a higher
        mean.
    """
    finished = runs["state"] == "finished"
    columns = ["optimizer", *settings]
    groups = runs.assign(value=runs[METRIC].where(finished)).groupby(columns, dropna=False, sort=True)
    table = groups["value"].agg(["mean", "std", "count"]).rename(columns={"count": "runs"})
    table["unfinished"] = groups["state"].agg(lambda states: int(states.isin(["incomplete", "failed"]).sum()))
    table = table.reset_index()
    rivals = [name for name in settings if name != RHO]
    highest = table.groupby(rivals, dropna=False)["mean"].transform("max") if rivals else table["mean"].max()
    table["best"] = table["mean"] == highest
    return table.sort_values([*rivals, "optimizer", *([RHO] if RHO in settings else [])], ignore_index=True)


def paired(runs: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """SAM minus its base optimizer in pairs of finished runs with the same seed and settings.

    Returns:
        The settings' columns, `difference` (points), `low` and `high` of its 95% interval by Student's t (NaN for a
        single pair), and the number of `pairs`.
    """
    finished = runs[runs["state"] == "finished"]
    is_sam = finished["optimizer"].str.contains("SAM")
    keys = ["base", "--seed", *(name for name in settings if name != RHO)]
    # Settings may be missing (no update interval without updates) and still have to match.
    finished = finished.assign(
        base=finished["optimizer"].str.split().str[0], **{k: finished[k].astype(str) for k in keys if k != "base"}
    )
    both = finished[is_sam].merge(
        finished[~is_sam][[*keys, METRIC]], on=keys, suffixes=("", "_base"), validate="many_to_one"
    )
    if both.empty:
        return pd.DataFrame()
    both["difference"] = both[METRIC] - both[f"{METRIC}_base"]
    table = both.groupby(["optimizer", *settings], dropna=False, sort=True)["difference"].agg(["mean", "std", "count"])
    half = [
        student.ppf(0.975, n - 1) * std / math.sqrt(n) if n > 1 else math.nan
        for std, n in zip(table["std"], table["count"], strict=True)
    ]
    table = table.assign(
        difference=table["mean"], low=table["mean"] - half, high=table["mean"] + half, pairs=table["count"]
    )
    return table.drop(columns=["mean", "std", "count"]).reset_index()


def readable(table: pd.DataFrame, marked: str = "**{}**") -> pd.DataFrame:
    """Figures as text: `mean ± std`, the best one marked."""
    out = table.drop(columns=["mean", "std", "best"]).copy()
    accuracy = [
        "" if math.isnan(mean) else f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"
        for mean, std in zip(table["mean"], table["std"], strict=True)
    ]
    best = [marked.format(text) if is_best else text for text, is_best in zip(accuracy, table["best"], strict=True)]
    out.insert(len(out.columns) - 2, "test accuracy (%)", best)
    return _shown(out)


def readable_pairs(table: pd.DataFrame) -> pd.DataFrame:
    out = table.drop(columns=["difference", "low", "high"]).copy()
    out.insert(len(out.columns) - 1, "minus base (points)", table["difference"].map("{:+.2f}".format))
    interval = [
        "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        for low, high in zip(table["low"], table["high"], strict=True)
    ]
    out.insert(len(out.columns) - 1, "95% interval", interval)
    return _shown(out)


def latex(table: pd.DataFrame) -> str:
    """The table of `readable` for LaTeX with booktabs."""
    escape = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "±": r"$\pm$"})
    text = readable(table, "{}").astype(str).map(lambda cell: cell.translate(escape))
    text = text.rename(columns=lambda name: name.translate(escape))
    accuracy = next(name for name in text.columns if "accuracy" in name)
    text.loc[table["best"].to_numpy(), accuracy] = text[accuracy].map(r"\textbf{{{}}}".format)
    return text.to_latex(index=False, escape=False)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    text = table.astype(object).where(table.notna(), "")
    text = text.map(lambda value: f"{value:g}" if isinstance(value, float) else value)
    return text.rename(columns=lambda name: name.removeprefix("--").replace("_", " "))


def markdown(runs: pd.DataFrame, settings: list[str]) -> str:
    """The whole summary as one page."""
    states, known = runs["state"].value_counts(), runs[runs["optimizer"].notna()]
    counts = ", ".join(
        f"{states[name]} {name}" for name in ("finished", "repeated", "incomplete", "failed") if name in states
    )
    parts = [f"{len(runs)} runs: {counts}."]
    parts.append(readable(summary(known, settings)).to_markdown(index=False, disable_numparse=True))
    if RHO in settings:
        parts.append("In bold the highest mean of a setting; a rho that it chooses is chosen on the test images.")
    pairs = paired(known, settings)
    if not pairs.empty:
        parts.append("In pairs of the same seed and settings, minus the base optimizer without SAM:")
        parts.append(readable_pairs(pairs).to_markdown(index=False, disable_numparse=True))
    broken = runs[runs["state"] != "finished"]
    if not broken.empty:
        parts.append("In no mean:")
        parts.append(
            "\n".join(f"- {row.directory}: {row.state} after {row.epochs_done} epochs" for row in broken.itertuples())
        )
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.summarize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="of runs or sweeps, at any depth")
    parser.add_argument("--output", type=Path, help="directory for the files (DIR/summary of the first DIR)")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.directories)
    except ValueError as error:
        parser.error(str(error))
    if METRIC not in runs:
        parser.error(f"none of the {len(runs)} runs has finished: launch the sweep again to finish it")
    settings = varying(runs)
    output = args.output or args.directories[0] / "summary"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to '{output}' ({error.strerror}): name another --output")
    known = runs[runs["optimizer"].notna()]
    table = summary(known, settings)
    files = {
        "summary.md": markdown(runs, settings),
        "summary.csv": table.to_csv(index=False),
        "summary.tex": latex(table),
        "paired.csv": paired(known, settings).to_csv(index=False),
        "runs.csv": runs.to_csv(index=False),
    }
    for name, text in files.items():
        write_text_atomically(output / name, text)
    finished = known[known["state"] == "finished"]
    lines = ["optimizer", *settings]
    pictures = {"accuracy_over_epochs.png": plots.over_epochs(finished, lines, output / "accuracy_over_epochs.png")}
    for name, flag in {"rho": RHO, "sparsity": "--sparsity"}.items():
        path = output / f"accuracy_against_{name}.png"
        pictures[path.name] = plots.against(finished, flag, [line for line in lines if line != flag], path)
    print(files["summary.md"])
    print("\n".join(str(output / name) for name in [*files, *(name for name, drawn in pictures.items() if drawn)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
