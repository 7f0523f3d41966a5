"""The picture of errors under corruption."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.corrupted import errors_by_corruption, errors_by_severity
from analysis.figures import add_legend, line_style, save_figure


def draw(arms: Sequence[tuple[str, list[dict]]], output: Path) -> list[Path]:
    """Draw errors against severity and by corruption; bars are standard deviations over seeds.

    Args:
        arms: a label, and what `measure` returned of each seed.
        output: the files, whatever its suffix.

    Returns:
        The files.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2])
    names = list(errors_by_corruption(arms[0][1][0]))
    handles = []
    for place, (label, runs) in enumerate(arms):
        style = line_style(place)
        curves = [{0: run["clean"]["error"]} | errors_by_severity(run) for run in runs]
        levels = list(curves[0])
        points = [_mean_and_std([curve[level] for curve in curves]) for level in levels]
        left.errorbar(levels, *zip(*points, strict=True), capsize=3, **style)
        by_name = [errors_by_corruption(run) for run in runs]
        points = [_mean_and_std([errors[name] for errors in by_name]) for name in names]
        offset = 0.6 * ((place + 0.5) / len(arms) - 0.5)
        right.errorbar(np.arange(len(names)) + offset, *zip(*points, strict=True), linestyle="none", capsize=2, **style)
        handles.append(Line2D([], [], label=label, **style))
    left.set_xticks(levels, ["clean" if level == 0 else str(level) for level in levels])
    left.set_xlabel("severity, mean over corruptions")
    left.set_ylabel("test error (%)")
    right.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=40, ha="right")
    right.set_title("by corruption, mean over severities", fontsize="medium")
    seeds = max(len(runs) for _, runs in arms)
    left.set_title("one seed each" if seeds == 1 else "mean ± standard deviation over seeds", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    add_legend(figure, handles)
    return save_figure(figure, output.with_name(output.name.removesuffix(".json")))


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0
