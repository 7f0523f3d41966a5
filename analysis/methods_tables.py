"""The tables that compare pruning methods, in Markdown."""

import math
import re
from statistics import mean

from analysis.comparison import BASE, LEVEL, Compared, Entry, compare, final, masks
from analysis.labels import count_text
from analysis.results_tables import NOT_RUN, diverged_note, limits, markdown, provenance, spread_text
from experiment.study import TASKS, methods_study
from utils.statistics import holm, paired_p, student_interval


def methods_table(entries: dict[str, Entry]) -> str:
    """Return the table of all methods: a row for each, at both sparsities, and one for each of SAM's rivals."""
    runs = {(run.cell, run.arm): entries[run.name] for run in methods_study() if run.name in entries}
    if not runs:
        return "Not run at today's defaults."
    dense = runs.get(("dense", "previous"), {}).get("final")
    head = [
        "method", "reached at 90%", "test accuracy (%)", "with SGD", "inference MFLOPs", "training FLOPs", "ever alive",
        "reached at 98%", "test accuracy (%)",
    ]  # fmt: skip
    rows = []
    for cell, arm in runs:
        if arm == "sgd" or masks("methods", cell)[1] == 0.98:
            continue
        first, beside, title = runs[cell, arm], runs.get((cell, "sgd")), method_title(cell)
        second = None if cell == "dense" else runs.get((cell.replace("-0.9", "-0.98"), arm))
        if arm != "previous":  # a rival of SAM's
            beside, title = None, f"{title}, {TASKS['methods'].arms[arm].title}"
        flops = ratio_text(first["final"], dense) if first["state"] == "finished" and dense else ""
        rows.append([
            title, figure(first, "sparsity", 4), accuracy_of(first), accuracy_of(beside),
            figure(first, "inference_flops", 1, 1e-6), flops, figure(first, "ever_alive", 3),
            figure(second, "sparsity", 4), accuracy_of(second),
        ])  # fmt: skip
    return "\n\n".join(
        [f"Every run: `{TASKS['methods'].flags}`.", markdown([head, *rows]), f"- {provenance(runs.values())}"]
    )


def accuracy_of(entry: Entry | None) -> str:
    """Return the test accuracy of a run, and after a semicolon that with batch norm's statistics estimated anew."""
    again = entry["final"].get("test_top1_recalibrated_bn") if entry and entry["state"] == "finished" else None
    return figure(entry, "test_top1", 2) + (f"; {again:.2f}" if again is not None else "")


def figure(entry: Entry | None, name: str, decimals: int, unit: float = 1.0) -> str:
    """Return a figure of a run; nothing for one that was not run."""
    if entry is None:
        return ""
    return f"{unit * entry['final'][name]:.{decimals}f}" if entry["state"] == "finished" else "diverged"


def ratio_text(final: dict, dense: dict) -> str:
    """Return the FLOPs of a training relative to those of the dense network."""
    return f"{final['training_flops'] / dense['training_flops']:.3f}"


def method_title(cell: str) -> str:
    """Return a method with those of its flags that are its own."""
    flags = re.sub(r"--prune-method | ?--(sparsity|update-interval) \S+", "", TASKS["methods"].cells[cell])
    name, pretrained, _ = flags.partition(" --pretrained")
    return f"`{name}`" + (" (from the run of `none`)" if pretrained else "")


def noise_table(entries: dict[str, Entry]) -> str:
    """Return the table of methods that were trained with wrong labels: a row for each, and a column for each arm."""
    task = TASKS["methods-noise"]
    cells = {cell: {row.arm: row for row in compare("methods-noise", cell, entries)} for cell in task.cells}
    rows = {(cell, arm): row for cell, arms in cells.items() for arm, row in arms.items()}
    if not rows:
        return NOT_RUN
    p = dict(zip(rows, holm([paired_p(row.differences) for row in rows.values()]), strict=True))
    others = [arm for arm in task.arms if any(arm in arms for arms in cells.values()) and arm != BASE]
    table = [["method", task.arms[BASE].title, *(f"{task.arms[arm].title} minus SGD" for arm in others)]]
    for cell, arms in cells.items():
        if arms:
            base = spread_text(final(arms[BASE].finished, "test_top1")) if BASE in arms else ""
            differences = [difference_text(arms.get(arm), p.get((cell, arm), math.nan)) for arm in others]
            table.append([f"`{masks('methods-noise', cell)[0]}`", base, *differences])
    if means := [over_methods([arms.get(arm) for arms in cells.values()], len(task.seeds)) for arm in others]:
        table.append(["mean of the methods", "", *means])
    count = sum(not math.isnan(corrected) for corrected in p.values())
    notes = [
        "Test accuracy (%), and differences in points with their 95% intervals, in pairs of the same seed. Bold: significant at "
        f"{LEVEL:.0%} after Holm's correction over the {count_text(count, 'difference')} of single methods. The last row is "
        "of the seeds' means over all methods, and has no correction.",
        *diverged_note(list(rows.values())),
        provenance(entry for row in rows.values() for entry in row.runs.values()),
    ]
    return "\n\n".join([f"Every run: `{task.flags}`.", markdown(table), "\n".join(f"- {note}" for note in notes)])


def difference_text(row: Compared | None, p: float) -> str:
    """Return an arm's difference to SGD with its interval, bold where p says so."""
    if row is None or row.difference is None:
        return ""
    mark = "**" if p < LEVEL else ""
    return f"{mark}{row.difference.mean:+.2f}{mark}" + (f" ({text})" if (text := limits(row.difference)) else "")


def over_methods(rows: list[Compared | None], seeds: int) -> str:
    """Return an arm's difference to SGD as a mean over all methods; nothing where a method lacks a pair.

    Args:
        rows: of the arm, one for each method.
        seeds: how many pairs each has to have.
    """
    whole = [row.differences for row in rows if row and len(row.differences) == seeds]
    if len(whole) < len(rows):
        return ""
    difference = student_interval([mean(values) for values in zip(*whole, strict=True)])
    return f"{difference.mean:+.2f} ({limits(difference)})"
