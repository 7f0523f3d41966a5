"""The tables that compare pruning methods, in Markdown."""

import re

from analysis.comparison import Entry, masks
from analysis.results_tables import markdown, provenance
from experiment.study import TASKS, methods_study


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
