"""A study as tables with one column per value of a flag, as papers print them."""

import pandas as pd

from analysis.labels import accuracy_text, count_text, setting_name, value_text
from analysis.run_table import METRIC, RHO, SPARSITY, begun, state_counts, varying
from analysis.tables import to_markdown
from utils.errors import UsageError

# Settings that a table of their own is made for, and settings that are rows.
TABLE_SETTINGS = ("data", "--dataset", "--arch", "--depth", "--width", "--epochs")
ROW_SETTINGS = (SPARSITY, "optimizer", RHO)


def pivot_column(runs: pd.DataFrame, flag: str) -> str:
    """Find the column that a flag names, written as prune_method or prune-method.

    Raises:
        UsageError: the runs have no such flag.
    """
    name = flag.replace("-", "_")
    columns = ["optimizer", *(column for column in runs if column.startswith("--"))]
    for column in (name, f"--{name}"):
        if column in columns:
            return column
    raise UsageError(f"--pivot names a flag of the runs or `optimizer`, for example prune_method, not '{flag}'")


def page(runs: pd.DataFrame, column: str, command: str) -> str:
    """Return the tables in Markdown, below what is known about the runs.

    Every combination of data, network and length is a table. Sparsity, optimizer and rho are rows where they vary, and so
    is every other setting in which runs of one cell would differ: a cell averages over seeds and nothing else.

    Args:
        runs: all runs.
        column: whose values are columns.
        command: made this page.
    """
    known = begun(runs)
    parts = [
        f"# Test accuracy by {setting_name(column)}",
        "Percent after the last epoch, mean ± standard deviation (runs); an empty cell has no finished run. "
        + state_counts(runs),
        "\n".join(f"- {name}: {text}" for name, text in _sources(known, command).items()),
    ]
    varying_settings = {*varying(known), "optimizer"} - {column}
    tables = [name for name in TABLE_SETTINGS if name in varying_settings]
    for _, part in known.groupby(tables, dropna=False, sort=True) if tables else [((), known)]:
        parts.append(f"## {_heading(part.iloc[0], column)}")
        rows, others = _rows(part, column, [name for name in varying_settings if name not in tables])
        parts.append(to_markdown(_table(part, column, rows)))
        if others:
            parts.append(f"Columns or rows also differ in {', '.join(map(setting_name, others))}.")
    return "\n\n".join(parts) + "\n"


def _sources(runs: pd.DataFrame, command: str) -> dict[str, str]:
    """Say where the figures come from."""
    sources = {"command": f"`{command}`; the command of a run is in its args.json"}
    for name in ("data", "commit", "device", "torch", "--epochs"):
        values = sorted(runs[name].dropna().unique())
        sources[setting_name(name)] = ", ".join(map(value_text, values)) or "unknown"
    return sources


def _heading(run: pd.Series, column: str) -> str:
    """Name what the runs of a table have in common, except the column."""
    depth = "" if column == "--depth" or pd.isna(run["--depth"]) else f"-{run['--depth']:.0f}"
    texts = {
        "--arch": f"{run['--arch']}{depth}",
        "--width": f"width {run['--width']:g}",
        "--dataset": f"on {run['data']}",
        "--epochs": count_text(run["--epochs"], "epoch"),
    }
    return ", ".join(text for name, text in texts.items() if name != column)


def _rows(runs: pd.DataFrame, column: str, settings: list[str]) -> tuple[list[str], list[str]]:
    """Divide the settings that vary among the runs of a table: those that are rows, and the others."""
    differing = [name for name in sorted(settings) if runs[name].map(repr).nunique() > 1]
    # Beside each other, optimizers with a rho and without share a row.
    rows = [name for name in ROW_SETTINGS if name in differing and (name, column) != (RHO, "optimizer")]
    others = [name for name in differing if name not in rows]
    for name in list(others):
        cells = runs.groupby([column, *rows], dropna=False)[name]
        if cells.agg(lambda values: values.map(repr).nunique()).max() > 1:
            rows.append(name)
            others.remove(name)
    return rows, others


def _by_kind(value: object) -> tuple[bool, object]:
    """A key by which numbers come before words: an interval is 100 steps or `1e`."""
    return isinstance(value, str), value


def _table(runs: pd.DataFrame, column: str, rows: list[str]) -> pd.DataFrame:
    """Fill a table: the settings of each row, then a cell per value of the column."""
    values = sorted(runs[column].dropna().unique(), key=_by_kind) + ([None] if runs[column].isna().any() else [])
    lines = []
    for key, part in runs.groupby(rows, dropna=False, sort=True) if rows else [((), runs)]:
        line = {setting_name(name): value_text(value) for name, value in zip(rows, key, strict=True)}
        for value in values:
            of_cell = part[part[column].isna() if value is None else part[column] == value]
            line[value_text(value) or "none"] = _cell(of_cell[of_cell["state"] == "finished"][METRIC])
        lines.append(line)
    return pd.DataFrame(lines)


def _cell(accuracy: pd.Series) -> str:
    return f"{accuracy_text(accuracy.mean(), accuracy.std())} ({len(accuracy)})" if len(accuracy) else ""
