"""Pictures of a study: test accuracy over epochs, against rho and against sparsity."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures import MOST_ENTRIES, add_legend, line_style
from analysis.labels import setting_name, value_text
from analysis.run_table import METRIC, RHO, SPARSITY, read_curves

SIZE = (7, 5)
SYMBOLS = {RHO: "\N{GREEK SMALL LETTER RHO}"}
TELLING = ("optimizer", RHO, "--prune_method", SPARSITY)


@dataclass(frozen=True)
class Line:
    """Runs that differ in nothing but the seed and what the horizontal axis shows.

    Attributes:
        label: its settings.
        group: its optimizer, or its label where few enough lines are drawn.
        runs: the finished runs.
        style: colour and marker.
    """

    label: str
    group: str
    runs: pd.DataFrame
    style: dict[str, Any]


def draw_against(runs: pd.DataFrame, flag: str, columns: list[str]) -> Figure | None:
    """Draw mean accuracy against a numeric flag.

    Runs without the flag, as SGD has no rho, are a dashed horizontal line.

    Args:
        runs: finished ones.
        flag: column of the horizontal axis.
        columns: settings that tell lines apart.

    Returns:
        None where the flag has fewer than two values.
    """
    values = sorted(runs[flag].dropna().unique())
    if len(values) < 2:
        return None
    figure, axes = _figure()
    lines, counts = _lines(runs, columns), []
    few = len(lines) <= MOST_ENTRIES
    for line in lines:
        with_flag, without = line.runs[line.runs[flag].notna()], line.runs[line.runs[flag].isna()]
        if len(with_flag):
            points = with_flag.groupby(flag)[METRIC].agg(["mean", "std", "count"])
            counts += points["count"].tolist()
            bars = points["std"].fillna(0) if few else None
            axes.errorbar(points.index, points["mean"], bars, capsize=3, **line.style)
        if len(without):
            counts.append(len(without))
            mean, std = without[METRIC].mean(), without[METRIC].std()
            axes.axhline(mean, color=line.style["color"], linestyle="--")
            if few and len(without) > 1:
                axes.axhspan(mean - std, mean + std, alpha=0.1, color=line.style["color"])
    if flag == RHO and values[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(values, [value_text(float(value)) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(SYMBOLS.get(flag, setting_name(flag)))
    axes.set_title(_spread(counts, lines), fontsize="medium")
    add_legend(figure, _handles(lines, flag))
    return figure


def draw_over_epochs(runs: pd.DataFrame, columns: list[str]) -> Figure:
    """Draw mean test accuracy over epochs, one line per combination of settings.

    Args:
        runs: finished ones.
        columns: settings that tell lines apart.
    """
    figure, axes = _figure()
    lines, last = _lines(runs, columns), 1
    few = len(lines) <= MOST_ENTRIES
    for line in lines:
        curves = pd.concat(read_curves(line.runs)).groupby("epoch")[METRIC].agg(["mean", "std"])
        style = line.style if few or len(curves) < 2 else {"color": line.style["color"], "linewidth": 0.8, "alpha": 0.6}
        axes.plot(curves.index, curves["mean"], markevery=max(1, len(curves) // 10), **style)
        if few and len(line.runs) > 1:
            low, high = curves["mean"] - curves["std"], curves["mean"] + curves["std"]
            axes.fill_between(curves.index, low, high, alpha=0.15, color=line.style["color"], linewidth=0)
        last = max(last, int(curves.index.max()))
    margin = max(0.5, 0.02 * last)
    axes.set_xlim(1 - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_title(_spread([len(line.runs) for line in lines], lines), fontsize="medium")
    add_legend(figure, _handles(lines))
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_ylabel("test accuracy (%)")
    return figure, axes


def _lines(runs: pd.DataFrame, columns: list[str]) -> list[Line]:
    """Split runs into lines: each has its own colour, or that of its optimizer where there are more than ten."""
    found = [(_label(columns, key), key, part) for key, part in runs.groupby(columns, dropna=False, sort=True)]
    place = columns.index("optimizer")
    few = len(found) <= MOST_ENTRIES
    groups = [label if few else str(key[place]) for label, key, _ in found]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [
        Line(label, group, part, line_style(numbers[group]))
        for (label, _, part), group in zip(found, groups, strict=True)
    ]


def _label(columns: list[str], values: Iterable[object]) -> str:
    """Describe a line by its settings, the telling ones first because a long label is cut; leave out missing ones."""
    texts = {column: value_text(value) for column, value in zip(columns, values, strict=True)}
    ordered = [*(name for name in TELLING if name in texts), *(name for name in columns if name not in TELLING)]
    named = {name: f"{SYMBOLS.get(name, setting_name(name))} {texts[name]}" for name in ordered if texts[name]}
    bare = {
        "optimizer": texts.get("optimizer"),
        "--prune_method": texts.get("--prune_method", "").replace("none", "dense"),
    }
    return ", ".join(bare.get(name) or text for name, text in named.items())


def _handles(lines: list[Line], flag: str | None = None) -> list[Line2D]:
    """Return an entry of the legend per group; it is dashed where none of the group's runs has the flag."""
    handles: dict[str, Line2D] = {}
    for line in lines:
        level = flag is not None and all(other.runs[flag].isna().all() for other in lines if other.group == line.group)
        style = {"color": line.style["color"], "linestyle": "--"} if level else line.style
        handles.setdefault(line.group, Line2D([], [], label=line.group, **style))
    return list(handles.values())


def _spread(counts: list[int], lines: list[Line]) -> str:
    """Say what a point is, over how many runs, and what bars and bands mean or colours tell."""
    low, high = min(counts), max(counts)
    over = f"over {high} seeds" if low == high else f"over {low} to {high} seeds"
    if len(lines) > MOST_ENTRIES:
        return f"{len(lines)} settings, {f'mean {over}' if high > 1 else 'one seed each'}; colours: optimizers"
    return f"mean ± standard deviation {over}" if high > 1 else "one seed each"
