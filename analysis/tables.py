"""The tables of a study: means by setting, and pairs of SAM and its base optimizer."""

import math

import pandas as pd

from analysis.labels import accuracy_text, count_text, setting_name, value_text
from analysis.run_table import HELD_OUT, METRIC, OF_OPTIMIZERS, RHO, SEED, begun, state_counts
from utils.statistics import student_interval


def summary(runs: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Average the runs of each combination of optimizer and settings.

    Args:
        runs: those that have begun.
        settings: columns that they differ in.

    Returns:
        One row per combination: its settings, `mean` and `std` in percent (a single run has no std), the number of `runs`
        in them and of `unfinished` ones (incomplete or failed), and `best`: whether its mean is the highest of two or more
        that differ only in the optimizer, its rho and what it alone has. Where runs have images held out there are also `held_out` and `held_out_std`,
        and the best are best on these.
    """
    finished = runs["state"] == "finished"
    columns = ["optimizer", *settings]
    figures = {"value": runs[METRIC].where(finished)}
    if HELD_OUT in runs:
        figures["held_out"] = runs[HELD_OUT].where(finished)
    groups = runs.assign(**figures).groupby(columns, dropna=False, sort=True)
    table = groups["value"].agg(["mean", "std", "count"]).rename(columns={"count": "runs"})
    table["unfinished"] = groups["state"].agg(lambda states: int(states.isin(["incomplete", "failed"]).sum()))
    if HELD_OUT in runs:
        table["held_out"], table["held_out_std"] = groups["held_out"].mean(), groups["held_out"].std()
    table = table.reset_index()
    shared = [name for name in settings if name not in OF_OPTIMIZERS]
    judged = "held_out" if "held_out" in table else "mean"
    rivals = table.groupby(shared, dropna=False)[judged] if shared else table.assign(all=0).groupby("all")[judged]
    table["best"] = (table[judged] == rivals.transform("max")) & (rivals.transform("count") > 1)
    own = [name for name in OF_OPTIMIZERS if name in settings]
    return table.sort_values([*shared, "optimizer", *own], ignore_index=True)


def paired(runs: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Compare SAM with its base optimizer in pairs of finished runs with the same seed and settings.

    Args:
        runs: those that have begun.
        settings: columns that they differ in.

    Returns:
        One row per kind of SAM and settings: `difference` (points, minus the base optimizer), `low` and `high` of its 95%
        interval by Student's t (NaN for a single pair), and the number of `pairs`. Empty where there are no pairs.
    """
    finished = runs[runs["state"] == "finished"]
    is_sam = finished["optimizer"].str.contains("SAM")
    shared = [SEED, *(name for name in settings if name != RHO)]
    # Settings may be missing (no update interval without updates) and still have to match, which their text does.
    keys = {f"same {name}": finished[name].map(repr) for name in shared}
    finished = finished.assign(base=finished["optimizer"].str.split().str[0], **keys)
    no_rho = finished[RHO].isna()  # CrAM+ and SAFE have one: no SAM is compared with them
    bases = finished[~is_sam & no_rho][["base", *keys, METRIC]]
    pairs = finished[is_sam].merge(bases, on=["base", *keys], suffixes=("", "_base"), validate="many_to_one")
    rows = []
    columns = ["optimizer", *settings]
    for key, part in pairs.groupby(columns, dropna=False, sort=True):
        center, low, high = student_interval((part[METRIC] - part[f"{METRIC}_base"]).tolist())
        figures = {"difference": center, "low": low, "high": high, "pairs": len(part)}
        rows.append(dict(zip(columns, key, strict=True)) | figures)
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame, bold: str = "**{}**") -> pd.DataFrame:
    """Format a summary as text, with `mean ± std` in one column. Bold are the best, in the column that they are best in."""
    out = table.drop(columns=["mean", "std", "held_out", "held_out_std", "best"], errors="ignore")
    shown = {"held-out accuracy (%)": ("held_out", "held_out_std")} if "held_out" in table else {}
    shown["test accuracy (%)"] = ("mean", "std")
    judged = next(iter(shown))
    for title, (mean, std) in shown.items():
        texts = [accuracy_text(*pair) for pair in zip(table[mean], table[std], strict=True)]
        if title == judged:
            texts = [bold.format(text) if best else text for text, best in zip(texts, table["best"], strict=True)]
        out.insert(len(out.columns) - 2, title, texts)
    return as_text(out)


def readable_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Format a paired comparison as text, with the interval in one column."""
    out = table.drop(columns=["difference", "low", "high"])
    limits = zip(table["low"], table["high"], strict=True)
    interval = ["" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}" for low, high in limits]
    out.insert(len(out.columns) - 1, "minus base (points)", table["difference"].map("{:+.2f}".format))
    out.insert(len(out.columns) - 1, "95% interval", interval)
    return as_text(out)


def latex(table: pd.DataFrame) -> str:
    """Format a summary for LaTeX with booktabs."""
    escape = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "±": r"$\pm$"})
    text = readable(table, "{}").map(lambda cell: cell.translate(escape))
    text = text.rename(columns=lambda name: name.translate(escape))
    accuracy = next(
        name for name in text.columns if "accuracy" in name
    )  # the first is the one that the best are best in
    text.loc[table["best"].to_numpy(), accuracy] = text[accuracy].map(r"\textbf{{{}}}".format)
    return text.to_latex(index=False, escape=False)


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Format all cells and column names for people."""
    return table.astype(object).map(value_text).rename(columns=setting_name)


def to_markdown(table: pd.DataFrame) -> str:
    """Format a table of texts as Markdown."""
    return table.to_markdown(index=False, disable_numparse=True)


def with_whole_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Write settings that are whole numbers without a decimal point, also where pandas made them floats."""
    whole = [
        name
        for name in table.columns
        if name.startswith("--") and table[name].dtype == float and (table[name].dropna() % 1 == 0).all()
    ]
    return table.astype(dict.fromkeys(whole, "Int64"))


def page(runs: pd.DataFrame, settings: list[str]) -> str:
    """Return the whole summary in Markdown: means, pairs, and the runs that are in no mean."""
    known = begun(runs)
    table = summary(known, settings)
    parts = [state_counts(runs), to_markdown(readable(table))]
    if table["best"].any():
        held_out = "held_out" in table
        chosen = "" if held_out or RHO not in settings else " A rho that is chosen by it is chosen on the test images."
        parts.append(f"Bold: the highest mean of a setting{' on held-out images' if held_out else ''}.{chosen}")
    pairs = paired(known, settings)
    if not pairs.empty:
        parts.append("In pairs of the same seed and settings, minus the base optimizer without SAM:")
        parts.append(to_markdown(readable_pairs(pairs)))
    others = runs[runs["state"] != "finished"]
    if not others.empty:
        lines = [
            f"- {row.directory}: {row.state} after {count_text(row.epochs_done, 'epoch')}"
            for row in others.itertuples()
        ]
        parts += ["In no mean:", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"
