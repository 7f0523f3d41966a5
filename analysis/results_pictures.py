"""Draw the pictures of the studies from comparisons: SVG files that name the data that they show by its hash.

A picture is drawn anew only when its data changes, since another release of matplotlib draws other bytes.
"""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

from analysis.command import matplotlib_imports, writing_to
from analysis.comparison import FEWEST, Compared, cell_title
from experiment.study_list import TASKS
from utils.files import write_text_atomically

CAPTIONS = {
    "frontier": (
        "Gain of every arm over SGD against the passes that its training takes",
        "Test accuracy minus that of SGD with the same seed, with 95% intervals, by forward and backward passes, those of SGD being 1. "
        "Filled: significant at 5% after Holm's correction over the arms of its panel.",
    ),
    "sparsities": (
        "Gain over SGD at several sparsities",
        "Test accuracy minus that of SGD with the same seed, with 95% intervals. Random directions move a living weight "
        "about equally far in every network. Where nothing else is said, masks are random and fixed.",
    ),
}
# Where scaled random directions would repeat the unscaled ones, these stand for them.
OVER_SPARSITIES = ("sam", "previous", "msam", "random-scaled", "sgd-half")
Comparisons = dict[tuple[str, str], list[Compared]]
Data = list[dict[str, Any]]


def frontier(comparisons: Comparisons) -> Data:
    """Return what the picture of cost and gain shows: a panel per task, of its first cell."""
    panels = []
    for task in TASKS:
        cell = TASKS[task].first
        if points := [point(row) for row in comparisons.get((task, cell), []) if len(row.differences) >= FEWEST]:
            pairs = max(each["pairs"] for each in points)
            panels.append({"title": f"{TASKS[task].title}: {cell_title(task, cell)}, {pairs} seeds", "points": points})
    return panels


def sparsities(comparisons: Comparisons) -> Data:
    """Return what the picture over sparsities shows: a panel per task of which two cells or more were compared."""
    panels = []
    for task in TASKS:
        cells = [cell for cell in TASKS[task].cells if "batch" not in cell]
        places = []
        for cell in sorted(cells, key=lambda cell: (TASKS[task].masks(cell)[0] == "rigl", TASKS[task].masks(cell)[1])):
            compared = {row.arm: row for row in comparisons.get((task, cell), []) if len(row.differences) >= FEWEST}
            points = [
                point(compared[here]) | {"arm": arm.title} for name, arm in TASKS[task].arms.items() if name in OVER_SPARSITIES
                if (here := name if TASKS[task].has(cell, name) else arm.rho_of) in compared
            ]  # fmt: skip
            if points:
                moving = TASKS[task].masks(cell)[0] == "rigl"
                places.append({"cell": cell_label(task, cell), "moving": moving, "points": points})
        if len(places) > 1:
            panels.append({"title": TASKS[task].title, "places": places})
    return panels


def point(row: Compared) -> dict[str, Any]:
    """Return what is drawn of an arm, rounded so that releases of scipy agree."""
    assert row.difference is not None
    return {
        "arm": row.title, "passes": round(row.passes, 2), "mean": round(row.difference.mean, 3),
        "low": round(row.difference.low, 3), "high": round(row.difference.high, 3), "told": row.verdict != 0,
        "pairs": len(row.differences),
    }  # fmt: skip


def cell_label(task: str, cell: str) -> str:
    """Return a cell's place on the axis of sparsities."""
    method, sparsity = TASKS[task].masks(cell)
    return "dense" if method == "none" else f"{100 * sparsity:g}%" + (", RigL" if method == "rigl" else "")


def digest(data: Data) -> str:
    """Return the hash by which a picture names its data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def is_outdated(file: Path, data: Data) -> bool:
    """Return whether a picture shows other data; without data there has to be none."""
    if not (data and file.exists()):
        return bool(data) or file.exists()
    found = re.search(r"data ([0-9a-f]{16})<", file.read_text())
    return not found or found[1] != digest(data)


def redraw(file: Path, name: str, data: Data) -> None:
    """Write a picture, or remove one that has no data."""
    if not data:
        file.unlink(missing_ok=True)
        return
    with matplotlib_imports():
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    figure, text = Figure(layout="constrained"), io.StringIO()
    FigureCanvasSVG(figure)
    (draw_frontier if name == "frontier" else draw_sparsities)(figure, data)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": f"data {digest(data)}"})
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    with writing_to(file, ""):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, "\n".join(lines) + "\n")


def draw_frontier(figure: Any, panels: Data) -> None:
    """Draw panels below each other: a column per arm, columns grouped by passes."""
    columns = list(dict.fromkeys((each["passes"], each["arm"]) for panel in panels for each in panel["points"]))
    columns.sort(key=lambda column: column[0])  # of equal passes as in the tables
    figure.set_size_inches(max(6.0, 2.0 + 0.42 * len(columns)), 2.0 + 2.3 * len(panels))
    groups = list(dict.fromkeys(passes for passes, _ in columns))
    place = {column: number + 0.8 * groups.index(column[0]) for number, column in enumerate(columns)}
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        axes.axhline(0, color="0.4", linewidth=1)
        for group in groups:
            at = [place[column] for column in columns if column[0] == group]
            axes.axvspan(at[0] - 0.7, at[-1] + 0.7, color="0.95", zorder=0)
            if axes is rows[0]:
                text = f"{group:g}" if len(at) < 3 else f"{group:g} passes" if group > 1 else "as many passes as SGD"
                axes.text(
                    (at[0] + at[-1]) / 2,
                    1.01,
                    text,
                    transform=axes.get_xaxis_transform(),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
        for each in panel["points"]:
            axes.errorbar(
                place[each["passes"], each["arm"]], each["mean"], [[each["mean"] - each["low"]], [each["high"] - each["mean"]]],
                fmt="o", color=f"C{groups.index(each['passes']) % 10}", markerfacecolor=None if each["told"] else "white",
                capsize=2, markersize=5,
            )  # fmt: skip
        axes.set_title(panel["title"], fontsize=9, pad=18 if axes is rows[0] else 6)
        axes.set_ylabel("minus SGD (points)", fontsize=8)
        axes.tick_params(labelsize=8)
    rows[-1].set_xticks(
        [place[column] for column in columns], [arm for _, arm in columns], rotation=45, ha="right", fontsize=8
    )


def draw_sparsities(figure: Any, panels: Data) -> None:
    """Draw panels beside each other: a line per arm over the cells, apart from cells whose masks move."""
    from matplotlib.lines import Line2D

    from analysis.figures import add_legend, line_style

    arms = list(dict.fromkeys(each["arm"] for panel in panels for at in panel["places"] for each in at["points"]))
    figure.set_size_inches(1.0 + 3.6 * len(panels), 4.2)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.axhline(0, color="0.4", linewidth=1)
        for number, arm in enumerate(arms):
            for moving in (False, True):
                points = [
                    (place + 0.08 * (number - (len(arms) - 1) / 2), each)
                    for place, at in enumerate(panel["places"]) if at["moving"] == moving
                    for each in at["points"] if each["arm"] == arm
                ]  # fmt: skip
                if points:
                    low = [each["mean"] - each["low"] for _, each in points]
                    high = [each["high"] - each["mean"] for _, each in points]
                    axes.errorbar(
                        [at for at, _ in points], [each["mean"] for _, each in points], [low, high], capsize=2, linewidth=1,
                        **line_style(number),
                    )  # fmt: skip
        axes.set_xticks(range(len(panel["places"])), [at["cell"] for at in panel["places"]], fontsize=8)
        axes.set_title(panel["title"], fontsize=9, wrap=True)
        axes.set_ylabel("minus SGD (points)", fontsize=8)
        axes.tick_params(labelsize=8)
    add_legend(figure, [Line2D([], [], label=arm, **line_style(number)) for number, arm in enumerate(arms)])
