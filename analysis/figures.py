"""Figures of matplotlib: files, legends and ticks."""

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.files import write_atomically

DPI, SUFFIXES = 150, (".png", ".pdf")
MOST_ENTRIES = 10  # of a legend
LABEL_WIDTH = 80  # characters
MARKERS = "os^Dv<>pX*"


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and, for papers, as PDF.

    Args:
        figure: what to write.
        path: the files without their suffix.

    Returns:
        The files.
    """
    files = [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    for file in files:
        write_atomically(file, partial(figure.savefig, format=file.suffix[1:], dpi=DPI))
    return files


def line_style(number: int) -> dict[str, Any]:
    """Return the colour and the marker of a line or group of lines; both repeat after ten."""
    return {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "markersize": 4}


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put a legend of at most ten entries below the axes of a figure with constrained layout."""
    if not handles:
        return
    shown = list(handles)
    if len(shown) > MOST_ENTRIES:
        rest = len(shown) - MOST_ENTRIES + 1
        shown = [*shown[: MOST_ENTRIES - 1], Line2D([], [], linestyle="none", label=f"and {rest} more")]
    for handle in shown:
        handle.set_label(short_label(str(handle.get_label())))
    longest = max(len(str(handle.get_label())) for handle in shown)
    per_row = int(13 * figure.get_figwidth()) // (longest + 8)  # 13 small letters per inch; 8 for line and gap
    figure.legend(
        handles=shown, loc="outside lower center", ncols=max(1, min(per_row, len(shown))), fontsize="small", frameon=False
    )  # fmt: skip


def short_label(text: str, width: int = LABEL_WIDTH) -> str:
    """Cut a label that is too long for a picture, at a word."""
    return textwrap.shorten(text, width, placeholder=" ...")


def log_ticks(low: float, high: float, most: int = 12) -> list[float]:
    """Choose round numbers between two positive ones for a logarithmic axis: 1, 2 and 5 times powers of ten, or fewer."""
    decades = [10.0**exponent for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps, stride in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
        ticks = [step * decade for decade in decades[::stride] for step in steps if low <= step * decade <= high]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else [low, high]
