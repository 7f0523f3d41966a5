"""Pictures of loss surfaces: a line, contours and a surface for each network, on the same axes and colours."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, whatever display there is
import matplotlib.pyplot as plt
import numpy as np

DPI, LEVELS = 130, 16


def draw(numbers: dict[str, np.ndarray], directory: Path) -> list[Path]:
    """Draw what there is.

    Args:
        numbers: `axis` [N], `labels` [networks], and `line` [networks, N], `plane` [networks, N, N] or both; a loss that
            is not finite is left blank.

    Returns:
        The files: line.png; contour.png and surface.png.
    """
    files = []
    axis, labels = numbers["axis"], numbers["labels"]
    if "line" in numbers:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for losses, label in zip(numbers["line"], labels, strict=True):
            axes.plot(axis, losses, label=label)
        axes.set(xlabel="along the direction (norms of the filters)", ylabel="loss (nats)", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        files.append(_save(figure, directory / "line.png"))
    if "plane" in numbers:
        files += [
            _contours(axis, numbers["plane"], labels, directory),
            _surfaces(axis, numbers["plane"], labels, directory),
        ]
    return files


def _contours(axis: np.ndarray, planes: np.ndarray, labels: np.ndarray, directory: Path) -> Path:
    levels = _levels(planes)
    figure, row = plt.subplots(
        1,
        len(planes),
        figsize=(3.6 * len(planes) + 1, 3.6),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes, losses, label in zip(row[0], planes, labels, strict=True):
        drawn = axes.contourf(
            axis, axis, losses, levels, norm=matplotlib.colors.LogNorm(), cmap="viridis", extend="both"
        )
        axes.contour(axis, axis, losses, levels, colors="white", linewidths=0.4)
        axes.plot(0, 0, "r+")
        axes.set(title=label, xlabel="first direction", aspect="equal")
    row[0][0].set_ylabel("second direction")
    bar = figure.colorbar(drawn, ax=list(row[0]), label="loss (nats)", ticks=levels[::3])
    bar.ax.set_yticklabels([f"{level:.2g}" for level in levels[::3]])
    bar.ax.minorticks_off()
    return _save(figure, directory / "contour.png")


def _surfaces(axis: np.ndarray, planes: np.ndarray, labels: np.ndarray, directory: Path) -> Path:
    heights = np.log10(planes)
    low, high = heights[np.isfinite(heights)].min(), heights[np.isfinite(heights)].max()
    figure = plt.figure(figsize=(4.2 * len(planes), 4.2), layout="constrained")
    x, y = np.meshgrid(axis, axis)
    for place, (losses, label) in enumerate(zip(heights, labels, strict=True), 1):
        axes = figure.add_subplot(1, len(planes), place, projection="3d")
        axes.plot_surface(x, y, np.where(np.isfinite(losses), losses, np.nan), cmap="viridis", vmin=low, vmax=high)
        axes.set_box_aspect(None, zoom=0.85)  # room for the labels
        ticks = axis[[0, len(axis) // 2, -1]]
        axes.set(title=label, zlim=(low, high), xticks=ticks, yticks=ticks, zlabel="log10 loss")
    return _save(figure, directory / "surface.png")


def _levels(planes: np.ndarray) -> np.ndarray:
    finite = planes[np.isfinite(planes)]
    low, high = finite.min(), finite.max()
    return np.geomspace(max(low, high * 1e-6), high * (1 + 1e-9) if high > low else low * 2, LEVELS)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
