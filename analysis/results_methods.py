"""The tables that compare pruning methods, in Markdown."""

import math
import re
from statistics import mean

from analysis.comparison import BASE, LEVEL, ROUNDING, Compared, Entry, compare, final
from analysis.labels import count_text
from analysis.results_tables import (
    NOT_RUN,
    direct_table,
    diverged_note,
    markdown,
    points,
    provenance,
    spread_text,
)
from experiment.study_list import TASKS, methods_study
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
        if arm == "sgd" or TASKS["methods"].masks(cell)[1] == 0.98:
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
    return f"`{name}`" + (" (from the run of `none` with one-step SAM)" if pretrained else "")


def compared_methods(entries: dict[str, Entry]) -> dict[str, dict[str, Compared]]:
    """Return the arms of each method that was trained with wrong labels, by cell and arm."""
    return {
        cell: {row.arm: row for row in compare("methods-noise", cell, entries)} for cell in TASKS["methods-noise"].cells
    }


def noise_table(entries: dict[str, Entry]) -> str:
    """Return the table of methods that were trained with wrong labels: a row for each, and a column for each arm."""
    task, cells = TASKS["methods-noise"], compared_methods(entries)
    rows = {(cell, arm): row for cell, arms in cells.items() for arm, row in arms.items()}
    if not rows:
        return NOT_RUN
    p = dict(zip(rows, holm([paired_p(row.differences, ROUNDING) for row in rows.values()]), strict=True))
    means = over_methods(cells)
    others = [arm for arm in task.arms if any(arm in arms for arms in cells.values()) and arm != BASE]
    table = [["method", task.arms[BASE].title, *(f"{task.arms[arm].title} minus SGD" for arm in others)]]
    for cell, arms in cells.items():
        if arms:
            base = spread_text(final(arms[BASE].finished, "test_top1")) if BASE in arms else ""
            differences = [points(arms[arm].difference, p[cell, arm]) if arm in arms else "" for arm in others]
            table.append([f"`{TASKS['methods-noise'].masks(cell)[0]}`", base, *differences])
    if others:
        told = over_methods_text(means)
        table.append(["mean of the methods", "", *(told.get(arm, "") for arm in others)])
    count = sum(not math.isnan(corrected) for corrected in p.values())
    notes = [
        "Test accuracy (%), and differences in points with their 95% intervals, in pairs of the same seed. Bold: significant at "
        f"{LEVEL:.0%} after Holm's correction over the {count_text(count, 'difference')} of single methods. The last row is "
        "of the seeds' means over all methods, corrected over its own differences.",
        *diverged_note(list(rows.values())),
        provenance(entry for row in rows.values() for entry in row.runs.values()),
    ]
    titles = {arm: task.arms[arm].title for arm in means}
    direct = direct_table(titles, lambda arm, other: [a - b for a, b in zip(means[arm], means[other], strict=True)])
    parts = [f"Every run: `{task.flags}`.", markdown(table), "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join([*parts, *(["The means over the methods beside each other:", *direct] if direct else [])])


def over_methods(cells: dict[str, dict[str, Compared]]) -> dict[str, list[float]]:
    """Return each arm's differences to SGD as means over all methods, seed by seed; without arms that lack a pair somewhere."""
    seeds, means = len(TASKS["methods-noise"].seeds), {}
    for arm in TASKS["methods-noise"].arms:
        rows = [found[arm].differences for found in cells.values() if arm in found]
        if [len(row) for row in rows] == [seeds] * len(cells):
            means[arm] = [mean(differences) for differences in zip(*rows, strict=True)]
    return means


def over_methods_text(means: dict[str, list[float]]) -> dict[str, str]:
    """Return each arm's difference over all methods, bold where it stands after Holm's correction over the arms."""
    p = holm([paired_p(values, ROUNDING) for values in means.values()])
    return {arm: points(student_interval(means[arm]), corrected) for arm, corrected in zip(means, p, strict=True)}


def means_over_methods(entries: dict[str, Entry]) -> dict[str, str]:
    """Return what each arm that has every run changed on average over the methods."""
    return over_methods_text(over_methods(compared_methods(entries)))
