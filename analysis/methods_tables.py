"""The tables that compare pruning methods, in Markdown."""

import math
import re
from statistics import mean

from analysis.comparison import BASE, LEVEL, Compared, Entry, compare, final, masks
from analysis.labels import count_text
from analysis.results_tables import NOT_RUN, diverged_note, limits, markdown, points, provenance, spread_text
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
    """Return the table of methods that were trained with wrong labels: a row for each."""
    task = TASKS["methods-noise"]
    cells = {cell: {row.arm: row for row in compare("methods-noise", cell, entries)} for cell in task.cells}
    rows = [row for arms in cells.values() for row in arms.values()]
    if not rows:
        return NOT_RUN
    p = holm([paired_p(row.differences) for row in rows])
    told = [row for row, corrected in zip(rows, p, strict=True) if corrected < LEVEL]
    others = [arm for arm in task.arms if arm != BASE]
    table = [
        ["method", task.arms[BASE].title, *(text for arm in others for text in (task.arms[arm].title, "minus SGD"))]
    ]
    for cell, arms in cells.items():
        if arms:
            table.append([f"`{masks('methods-noise', cell)[0]}`", accuracies(arms.get(BASE))])
            for row in map(arms.get, others):
                table[-1] += [accuracies(row), difference_text(row, row in told)]
    count = sum(not math.isnan(corrected) for corrected in p)
    notes = [
        f"With 95% intervals, in pairs of the same seed. Bold: significant at {LEVEL:.0%} after Holm's correction over the "
        f"table's {count_text(count, 'difference')}.",
        *over_methods({arm: [arms.get(arm) for arms in cells.values()] for arm in others}, len(task.seeds)),
        *diverged_note(rows),
        provenance(entry for row in rows for entry in row.runs.values()),
    ]
    return "\n\n".join([f"Every run: `{task.flags}`.", markdown(table), "\n".join(f"- {note}" for note in notes)])


def accuracies(row: Compared | None) -> str:
    """Return the test accuracy of an arm over its seeds."""
    return spread_text(final(row.finished, "test_top1")) if row else ""


def difference_text(row: Compared | None, bold: bool) -> str:
    """Return an arm's difference to SGD with its interval."""
    if row is None or row.difference is None:
        return ""
    mark = "**" if bold else ""
    return f"{mark}{row.difference.mean:+.2f}{mark} ({limits(row.difference)})"


def over_methods(rows: dict[str, list[Compared | None]], seeds: int) -> list[str]:
    """Return the note on the mean over all methods, of the arms that have every seed with each of them.

    Args:
        rows: by arm, one for each method.
        seeds: how many there are.
    """
    told = [
        f"{found[0].title} {points(student_interval([mean(values) for values in zip(*(row.differences for row in found), strict=True)]))}"
        for arm in rows
        if len(found := [row for row in rows[arm] if row and len(row.differences) == seeds]) == len(rows[arm])
    ]
    return [f"Mean over the methods, minus SGD, with 95% intervals over the seeds: {'; '.join(told)}."] if told else []
