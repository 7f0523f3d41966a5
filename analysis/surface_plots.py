"""Pictures of the loss around networks: lines, contours and surfaces, on the same axes and colours."""

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from analysis.figures import add_legend, line_style, log_ticks, save_figure, short_label

LEVELS = 16
PER_ROW = 3  # networks
DIRECTION = "direction {} (filter norms)"
LOSS = "loss (nats)"


def draw(numbers: dict[str, np.ndarray], directory: Path) -> list[Path]:
    """Draw lines, and contours and surfaces, where there are numbers for them.

    Args:
        numbers: `axis` [N], `labels` [networks], and `line` [networks, N], `plane` [networks, N, N] or both. A loss that
            is not finite is left blank.
        directory: where to write; exists.

    Returns:
        The files: line, contour and surface, each as PNG and PDF.
    """
    axis, labels = numbers["axis"], [str(label) for label in numbers["labels"]]
    files = []
    if "line" in numbers:
        files += save_figure(draw_lines(axis, numbers["line"], labels), directory / "line")
    if "plane" in numbers:
        files += save_figure(draw_contours(axis, numbers["plane"], labels), directory / "contour")
        files += save_figure(draw_surfaces(axis, numbers["plane"], labels), directory / "surface")
    return files


def draw_lines(axis: np.ndarray, lines: np.ndarray, labels: list[str]) -> Figure:
    """Draw the loss along the first direction, one line per network."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (losses, label) in enumerate(zip(lines, labels, strict=True)):
        axes.plot(axis, losses, label=label, markevery=max(1, len(axis) // 10), **line_style(number))
    axes.set(xlabel=DIRECTION.format(1), ylabel=LOSS, yscale="log")
    ticks = log_ticks(*_limits(lines))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    add_legend(figure, axes.lines)
    return figure


def draw_contours(axis: np.ndarray, planes: np.ndarray, labels: list[str]) -> Figure:
    """Draw the contours of the loss in the plane, one panel per network."""
    low, high = _limits(planes)
    levels = np.geomspace(low, high, LEVELS)
    rows, columns = _shape(len(planes))
    figure = Figure(figsize=(3.4 * columns + 1, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, losses, label in zip(panels.flat, planes, labels, strict=False):
        losses = np.maximum(losses, low)
        drawn = axes.contourf(axis, axis, losses, levels, norm=LogNorm(low, high), cmap="viridis")
        axes.contour(axis, axis, losses, levels, colors="white", linewidths=0.4)
        axes.plot(0, 0, "r+")
        axes.set_title(_title(label), fontsize="medium")
        axes.set_aspect("equal")
        _label_ends(axes, axis)
    for axes in panels.flat[len(planes) :]:
        axes.set_axis_off()
    figure.supxlabel(DIRECTION.format(1), fontsize="medium")
    figure.supylabel(DIRECTION.format(2), fontsize="medium")
    ticks = log_ticks(low, high)
    bar = figure.colorbar(drawn, ax=panels, label=LOSS, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    return figure


def draw_surfaces(axis: np.ndarray, planes: np.ndarray, labels: list[str]) -> Figure:
    """Draw the loss over the plane on a logarithmic scale, one panel per network."""
    low, high = _limits(planes)
    with np.errstate(divide="ignore", invalid="ignore"):
        heights = np.log10(planes)
    heights = np.where(np.isfinite(heights), heights, np.nan)
    rows, columns = _shape(len(planes))
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows), layout="constrained")
    x, y = np.meshgrid(axis, axis)
    ticks = log_ticks(low, high, most=6)
    limits = math.log10(low), math.log10(high)
    for place, (losses, label) in enumerate(zip(heights, labels, strict=True), 1):
        axes: Any = figure.add_subplot(rows, columns, place, projection="3d")  # matplotlib does not type these axes
        axes.plot_surface(x, y, losses, cmap="viridis", vmin=limits[0], vmax=limits[1])
        axes.set_box_aspect(None, zoom=0.85)  # room for the labels
        axes.set_zlim(limits)
        _label_ends(axes, axis)
        axes.set(xlabel=DIRECTION.format(1), ylabel=DIRECTION.format(2), zlabel=LOSS)
        axes.set_zticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
        axes.set_title(_title(label), fontsize="medium")
    return figure


def _limits(losses: np.ndarray) -> tuple[float, float]:
    """Return the lowest and the highest loss, at most six decades below it, for a logarithmic scale."""
    positive = losses[np.isfinite(losses) & (losses > 0)]
    if not len(positive):
        return 0.1, 1.0
    low, high = float(positive.min()), float(positive.max())
    return max(low, high * 1e-6), high * (1 + 1e-9) if high > low else low * 2


def _shape(networks: int) -> tuple[int, int]:
    rows = math.ceil(networks / PER_ROW)
    return rows, math.ceil(networks / rows)


def _label_ends(axes: Axes, axis: np.ndarray) -> None:
    """Label both ends and the middle of the two directions."""
    ticks = [float(axis[0]), 0.0, float(axis[-1])]
    labels = [f"{tick:g}" for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)


def _title(label: str) -> str:
    return textwrap.fill(short_label(label), 34)
