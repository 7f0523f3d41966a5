"""Fill the tables and pictures of the pages from the ledger.

What stands between `<!-- ledger: NAME -->` and `<!-- /ledger -->` in a page is replaced by the block of that name.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median, median_low, stdev

from analysis import results_pictures
from analysis.command import writing_to
from analysis.comparison import (
    BASE,
    CONTROL,
    FEWEST,
    LEVEL,
    Compared,
    Entry,
    cell_title,
    compare,
    core_hours,
    final,
    masks,
    pairs,
)
from analysis.labels import accuracy_text, count_text
from analysis.ledger import Ledger
from analysis.study import best_rho, tuning_runs
from analysis.text_table import mean_and_std_text
from experiment.study import STUDIES, TASKS, TUNING_SEEDS, Run, methods_study
from utils.errors import UsageError
from utils.files import write_text_atomically
from utils.statistics import Interval, detectable_difference, student_interval

PAGES = ("README.md", "RESULTS.md", "docs/one-step.md")
PICTURES = Path("docs/results")
OPENING = re.compile(r"^<!-- ledger: (.*) -->$", re.MULTILINE)
BLOCK = re.compile(r"^<!-- ledger: (\S+) -->\n(?:(?!<!-- ledger).*\n)*?<!-- /ledger -->$", re.MULTILINE)
COMPARED = tuple(name for name in TASKS if name != "methods")
HEADLINE = {"previous": "one-step SAM", "sam": "two-step SAM", "msam": "MSAM", "random": "random directions"}
DIRECT = (("previous", "random"), (CONTROL, "previous"))  # what the gradient's direction buys, and what a second pass
NOT_RUN = "No run of it is in the ledger yet."


def render(root: Path, results: Path, check: bool = False) -> list[str]:
    """Bring the pages and pictures of a checkout up to date with the ledger.

    Args:
        root: of the checkout.
        results: the ledger.
        check: change nothing.

    Returns:
        What differed.

    Raises:
        UsageError: a marker or a file of the ledger is wrong.
    """
    ledgers = {task: Ledger(results / task, None).entries for task in TASKS}
    tell_unlisted(ledgers)
    comparisons = compare_all(ledgers)
    pictures = {
        "frontier": results_pictures.frontier(comparisons),
        "sparsities": results_pictures.sparsities(comparisons),
    }
    blocks = {
        "headlines": headlines(comparisons),
        "methods": methods_table(ledgers["methods"]),
        **{task: task_section(task, ledgers[task], comparisons, results / task / "rho") for task in COMPARED},
    }
    changed, pages = [], {}
    for name in PAGES:
        page = root / name
        if page.exists():
            before = page.read_text()
            links = {key: picture_link(key, page, root) if data else "" for key, data in pictures.items()}
            after = fill(before, blocks | links, name)
            if before != after:
                pages[page] = after
                changed.append(f"{name} ({', '.join(differing(before, after))})")
    outdated = {
        key: data for key, data in pictures.items() if results_pictures.is_outdated(picture_file(key, root), data)
    }
    changed += [str(picture_file(key, Path())) for key in outdated]
    if not check:
        for key, data in outdated.items():
            results_pictures.redraw(picture_file(key, root), key, data)
        for page, text in pages.items():
            with writing_to(page):
                write_text_atomically(page, text)
    return changed


def tell_unlisted(ledgers: dict[str, dict[str, Entry]]) -> None:
    """Say which runs of the ledger are in no table."""
    listed = {(run.task, run.name) for study in STUDIES.values() for run in study()}
    for task, entries in ledgers.items():
        if unlisted := [name for name in entries if (task, name) not in listed]:
            print(
                f"note: results/{task} has {count_text(len(unlisted), 'run')} that experiment/study.py does not list, "
                f"such as '{unlisted[0]}': in no table",
                file=sys.stderr,
            )


def compare_all(ledgers: dict[str, dict[str, Entry]]) -> dict[tuple[str, str], list[Compared]]:
    """Return the comparison of every cell that has runs, by task and cell."""
    cells = ((task, cell) for task in COMPARED for cell in TASKS[task].cells)
    compared = {(task, cell): compare(task, cell, ledgers[task]) for task, cell in cells}
    return {key: rows for key, rows in compared.items() if rows}


def fill(text: str, blocks: dict[str, str], page: str) -> str:
    """Return a page with the blocks between its markers. Raises UsageError."""
    names = OPENING.findall(text)
    if len(BLOCK.findall(text)) != len(names) or text.count("\n<!-- /ledger -->") != len(names):
        raise UsageError(
            f"'{page}': a line <!-- ledger: NAME --> and a line <!-- /ledger --> belong together: restore the missing one"
        )
    if unknown := sorted(set(names) - blocks.keys()):
        raise UsageError(f"'{page}' has a marker for '{unknown[0]}': the ledger makes {', '.join(sorted(blocks))}")

    def block(found: re.Match) -> str:
        content = blocks[found[1]]
        return f"<!-- ledger: {found[1]} -->\n" + (f"{content}\n" if content else "") + "<!-- /ledger -->"

    return BLOCK.sub(block, text)


def differing(before: str, after: str) -> list[str]:
    """Return the names of the blocks in which two versions of a page differ."""
    both = zip(BLOCK.finditer(before), BLOCK.finditer(after), strict=True)
    return list(dict.fromkeys(new[1] for old, new in both if old[0] != new[0]))


def picture_file(name: str, root: Path) -> Path:
    """Return where a picture lies."""
    return root / PICTURES / f"{name}.svg"


def picture_link(name: str, page: Path, root: Path) -> str:
    """Return a picture with its caption for a page."""
    title, caption = results_pictures.CAPTIONS[name]
    return f"![{title}]({os.path.relpath(picture_file(name, root), page.parent)})\n\n*{caption}*"


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = (rows[0], ["---"] * len(rows[0]), *rows[1:])
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def headlines(comparisons: dict[tuple[str, str], list[Compared]]) -> str:
    """Return what one and two steps changed in the first cell of each task: accuracy and, where measured, sharpness."""
    lines = []
    for task in COMPARED:
        cell = next(iter(TASKS[task].cells))
        rows = {row.arm: row for row in comparisons.get((task, cell), []) if len(row.differences) >= FEWEST}
        if "previous" not in rows:
            continue
        parts = [f"{title} {points(rows[arm].difference)}" for arm, title in HEADLINE.items() if arm in rows]
        where = f"{cell_title(task, cell)}, {count_text(len(rows['previous'].differences), 'seed')}"
        lines.append(
            f"- **{TASKS[task].title}** ({where}), minus SGD in points of test accuracy, with 95% intervals: {'; '.join(parts)}."
        )
        measured = {row.arm: mean(row.eigenvalues) for row in comparisons[task, cell] if row.eigenvalues}
        if told := [
            f"{title} {measured[arm]:.3g}" for arm, title in ({BASE: "SGD"} | HEADLINE).items() if arm in measured
        ]:
            lines.append(f"- **Sharpness** there, the largest eigenvalue of the Hessian at the end: {'; '.join(told)}.")
    return "\n".join(lines) or "No comparison is in the ledger yet."


def points(difference: Interval | None) -> str:
    """Return a difference with its interval."""
    assert difference is not None
    return f"**{difference.mean:+.2f}** ({limits(difference)})"


def limits(difference: Interval) -> str:
    """Return the 95% interval of a difference; nothing for a single pair."""
    return "" if math.isnan(difference.low) else f"{difference.low:+.2f} to {difference.high:+.2f}"


def task_section(
    task: str, entries: dict[str, Entry], comparisons: dict[tuple[str, str], list[Compared]], rhos: Path
) -> str:
    """Return all tables of a task.

    Args:
        task: its name.
        entries: its runs.
        comparisons: of all cells that have runs.
        rhos: folder of the rhos that were chosen.
    """
    parts = [f"Every run: `{TASKS[task].flags}`, and SGD with momentum 0.9 where nothing else is said."]
    for cell, flags in TASKS[task].cells.items():
        if rows := comparisons.get((task, cell)):
            parts += [
                f"### {TASKS[task].title}: {cell_title(task, cell)}",
                f"`{flags}`",
                cell_table(rows),
                cell_notes(rows),
            ]
    if tuned := tuning_table(task, entries, rhos):
        parts += [f"### {TASKS[task].title}: the choice of rho", tuned]
    return "\n\n".join(parts) if len(parts) > 1 else NOT_RUN


def cell_table(rows: list[Compared]) -> str:
    """Return the table of a cell: a row per arm; columns that would be empty are left out."""
    table = [
        {
            "arm": f"{row.title}, the positive control" if row.arm == CONTROL else row.title,
            "rho": row.rho,
            "passes per step": "" if math.isnan(row.passes) else f"{row.passes:.3g}",
            "test accuracy (%)": spread_text(final(row.finished, "test_top1")),
            "runs": str(len(row.finished)),
            "diverged": str(row.diverged or ""),
            "minus SGD (points)": f"{row.difference.mean:+.2f}" if row.difference else "",
            "95% interval": limits(row.difference) if row.difference else "",
            "pairs": str(len(row.differences) or ""),
            "p (Holm)": p_text(row.p),
            "largest eigenvalue": eigenvalue_text(row.eigenvalues),
        }
        for row in rows
    ]
    names = [name for name in table[0] if any(row[name] for row in table)]
    return markdown([names, *([row[name] for name in names] for row in table)])


def spread_text(values: list[float]) -> str:
    """Return the mean of accuracies and their standard deviation."""
    return accuracy_text(mean(values), stdev(values) if len(values) > 1 else math.nan) if values else ""


def p_text(p: float) -> str:
    """Return a p-value with three decimals."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def eigenvalue_text(values: list[float]) -> str:
    """Return the mean of eigenvalues and their standard deviation."""
    return mean_and_std_text(values) if len(values) > 1 else f"{values[0]:.4g}" if values else ""


def cell_notes(rows: list[Compared]) -> str:
    """Return what a cell's table says, what it could have said, and what it cost."""
    notes, tested = [], [row for row in rows if not math.isnan(row.p)]
    if tested:
        groups = {1: "above SGD", -1: "below SGD", 0: "not told apart from SGD"}
        told = [
            f"{text}: {', '.join(f'*{row.title}*' for row in found)}"
            for verdict, text in groups.items()
            if (found := [row for row in tested if row.verdict == verdict])
        ]
        arms = f" over {count_text(len(tested), 'arm')}" if len(tested) > 1 else ""
        notes.append(f"At {LEVEL:.0%} after Holm's correction{arms}: {'; '.join(told)}.")
        spread, count = (
            median(stdev(row.differences) for row in tested),
            median_low(len(row.differences) for row in tested),
        )
        notes.append(
            f"Power: with {count} pairs whose differences have a standard deviation of {spread:.2f} points (the arms' median), "
            f"a true difference of {detectable_difference(spread, count):.2f} points is found in 80% of cases at {LEVEL:.0%}, "
            "uncorrected."
        )
    if direct := direct_comparisons({row.arm: row for row in rows}):
        notes.append(f"In pairs, uncorrected, with 95% intervals: {'; '.join(direct)}.")
    if diverged := sum(row.diverged for row in rows):
        notes.append(
            f"{count_text(diverged, 'run')} diverged, and {'is' if diverged == 1 else 'are'} in no mean and no pair."
        )
    entries = [entry for row in rows for entry in row.runs.values()]
    notes.append(provenance(entries))
    return "\n".join(f"- {note}" for note in notes)


def direct_comparisons(rows: dict[str, Compared]) -> list[str]:
    """Return differences between two arms neither of which is SGD."""
    told = []
    for arm, other in DIRECT:
        if arm in rows and other in rows:
            differences = pairs(rows[arm].runs, rows[other].runs)
            if len(differences) >= FEWEST:
                told.append(f"{rows[arm].title} minus {rows[other].title} {points(student_interval(differences))}")
    return told


def provenance(entries: Iterable[Entry]) -> str:
    """Return what runs cost, and of which commits and devices they are."""
    entries = list(entries)

    def distinct(name: str, length: int | None = None) -> list[str]:
        return sorted({entry[name][:length] for entry in entries})

    devices, commits = distinct("device"), distinct("commit", 7)
    unit = "core-hours" if all(device.startswith("cpu") for device in devices) else "hours of runs"
    text = (
        f"Cost: {core_hours(entries):.1f} {unit}, {count_text(len(entries), 'run')}; {', '.join(devices)}; "
        f"torch {', '.join(distinct('torch'))}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    )
    kinds = len(distinct("mathematics"))
    return f"{text}, which compute in {kinds} ways (the files that decide figures differ)." if kinds > 1 else f"{text}."


def tuning_table(task: str, entries: dict[str, Entry], rhos: Path) -> str:
    """Return the held-out accuracies by which rhos were chosen; "" where there are none."""
    rows, tried, at_an_end = [], [], []
    for name, arm in TASKS[task].arms.items():
        trials = [run for run in tuning_runs(task, name) if run.name in entries]
        if not trials:
            continue
        chosen = chosen_rho(trials, entries, rhos / f"{name}.json")
        values = best_rho(trials, entries)["held_out"]
        cells = [f"{rho:g}: {held_out_text(values, rho, trials)}" if f"{rho:g}" in values else "" for rho in arm.rhos]
        rows.append(
            [arm.title, *(f"**{text}**" if rho == chosen else text for rho, text in zip(arm.rhos, cells, strict=True))]
        )
        tried += [entries[run.name] for run in trials]
        if chosen in (arm.rhos[0], arm.rhos[-1]):
            at_an_end.append(f"*{arm.title}*")
    if not rows:
        return ""
    width = max(map(len, rows))
    table = markdown(
        [["arm", "rho: held-out accuracy (%)", *[""] * (width - 2)], *(row + [""] * (width - len(row)) for row in rows)]
    )
    cell, seeds = cell_title(task, next(iter(TASKS[task].cells))), " and ".join(map(str, TUNING_SEEDS))
    notes = [
        f"Mean of the seeds {seeds} after the last epoch, on {TASKS[task].val_split} images held out of training, with their right labels; {cell}. Bold: "
        "chosen, for all cells."
    ]
    if at_an_end:
        notes.append(
            f"Chosen at an end of what was tried, so that there may be a better one beyond: {', '.join(at_an_end)}."
        )
    notes.append(provenance(tried))
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes)


def chosen_rho(trials: list[Run], entries: dict[str, Entry], file: Path) -> float | None:
    """Return the rho that stands in an arm's runs; None as long as none is chosen."""
    if file.exists():
        try:
            return json.loads(file.read_text())["rho"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"cannot read '{file}' ({error}): restore it from git, or remove it") from error
    whole = len(trials) == len(TUNING_SEEDS) * len(TASKS[trials[0].task].arms[trials[0].arm].rhos)
    return best_rho(trials, entries)["rho"] if whole else None


def held_out_text(values: dict[str, float | None], rho: float, trials: list[Run]) -> str:
    """Return a held-out accuracy, and of how many runs it is where some are missing."""
    value, count = values[f"{rho:g}"], sum(run.rho == rho for run in trials)
    missing = f" ({count_text(count, 'run')})" if count < len(TUNING_SEEDS) else ""
    return ("diverged" if value is None else f"{value:.2f}") + missing


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
