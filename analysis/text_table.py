"""Tables of numbers for a terminal."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

WIDTH = 100


def text_table(rows: Sequence[dict[str, str]], width: int = WIDTH) -> str:
    """Align rows of texts in columns, the first one to the left; columns that do not fit continue below.

    Args:
        rows: column names and cells; all rows have the same columns.
        width: characters per line. A table of two columns may be wider.
    """
    names = list(rows[0])
    size = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    first, rest = names[0], names[1:]
    blocks: list[list[str]] = [[]]
    for name in rest:
        used = size[first] + sum(2 + size[other] for other in blocks[-1])
        if blocks[-1] and used + 2 + size[name] > width:
            blocks.append([])
        blocks[-1].append(name)
    lines = []
    for block in blocks:
        for row in ({name: name for name in names}, *rows):
            cells = [row[first].ljust(size[first]), *(row[name].rjust(size[name]) for name in block)]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def number_text(value: float | None) -> str:
    """Return a number with four significant digits, and `-` for one that is missing."""
    return "-" if value is None else f"{value:.4g}"


def mean_and_std_text(values: Sequence[float | None]) -> str:
    """Return `mean ± standard deviation` with as many decimals as the deviation has two significant digits.

    It is `-` where a value is missing.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    center, deviation = mean(known), stdev(known)
    decimals = max(0, 1 - math.floor(math.log10(deviation))) if deviation else math.inf
    if decimals > 6:
        return f"{center:.4g} ± {deviation:.2g}"
    return f"{center:.{decimals}f} ± {deviation:.{decimals}f}"
