"""Pictures of a study: accuracy against rho, over epochs, and against sparsity."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, whatever display there is
import matplotlib.pyplot as plt
import pandas as pd

from analysis.results import METRIC, read_curves

SIZE, DPI = (7, 4.5), 150


def against(runs: pd.DataFrame, flag: str, lines: list[str], path: Path) -> bool:
    """Mean accuracy with its standard deviation against a numeric flag, a line for each combination of other columns.

    Runs without that flag (SGD has no rho) are a horizontal line. Returns whether there was anything to draw.
    """
    with_flag, without = runs[runs[flag].notna()], runs[runs[flag].isna()]
    if with_flag[flag].nunique() < 2:
        return False
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for label, group in _groups(with_flag, lines):
        points = group.groupby(flag)[METRIC].agg(["mean", "std"]).fillna(0)
        axes.errorbar(points.index, points["mean"], points["std"], marker="o", capsize=3, label=label)
    for number, (label, group) in enumerate(_groups(without, lines)):
        style = {"color": f"{min(0.6, 0.2 * number):g}", "linestyle": "--"}
        middle, deviation = group[METRIC].mean(), group[METRIC].std() if len(group) > 1 else 0.0
        axes.axhline(middle, label=label, **style)
        axes.axhspan(middle - deviation, middle + deviation, alpha=0.1, color=style["color"])
    if flag == "--sam_rho" and (with_flag[flag] > 0).all():
        axes.set_xscale("log")
    ticks = sorted(with_flag[flag].unique())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _finish(figure, [axes], flag.removeprefix("--").replace("sam_", ""), path)
    return True


def over_epochs(runs: pd.DataFrame, lines: list[str], path: Path) -> bool:
    """Test accuracy over epochs, mean and standard deviation over seeds: a panel an optimizer, a line a setting."""
    panels = _groups(runs, ["optimizer"])
    width = max(SIZE[0], 4 * len(panels))
    figure, row = plt.subplots(
        1, len(panels), figsize=(width, SIZE[1]), sharey=True, squeeze=False, layout="constrained"
    )
    rest = [line for line in lines if line != "optimizer"]
    for axes, (name, panel) in zip(row[0], panels, strict=True):
        groups = _groups(panel, rest) if rest else [("", panel)]
        for number, (label, group) in enumerate(groups):
            color = plt.get_cmap("viridis")(number / max(1, len(groups)))
            curves = pd.concat(read_curves(group)).groupby("epoch")[METRIC].agg(["mean", "std"]).fillna(0)
            axes.plot(curves.index, curves["mean"], color=color, label=label or None)
            low, high = curves["mean"] - curves["std"], curves["mean"] + curves["std"]
            axes.fill_between(curves.index, low, high, alpha=0.15, color=color)
        axes.set_title(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, row[0], "epoch", path)
    return True


def _groups(runs: pd.DataFrame, columns: list[str]) -> list[tuple[str, pd.DataFrame]]:
    if runs.empty:
        return []
    groups = runs.groupby(columns, dropna=False, sort=True)
    return [(_label(columns, key), group) for key, group in groups]


def _label(columns: list[str], values: tuple) -> str:
    parts = []
    for column, value in zip(columns, values, strict=True):
        if not pd.isna(value):
            parts.append(str(value) if column == "optimizer" else f"{column.removeprefix('--')} {value}")
    return ", ".join(parts)


def _finish(figure: plt.Figure, panels: Sequence[plt.Axes], label: str, path: Path) -> None:
    for axes in panels:
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    panels[0].set_ylabel("test accuracy (%)")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
