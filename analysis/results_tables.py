"""The study's tables, in Markdown: every arm of a cell beside SGD, and the choice of what is tuned."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from statistics import mean, median, median_low, stdev

from analysis.comparison import (
    BASE,
    CONTROL,
    FEWEST,
    LEVEL,
    ROUNDING,
    Compared,
    Entry,
    cell_title,
    core_hours,
    final,
    pairs,
)
from analysis.labels import accuracy_text, count_text
from analysis.study import best_value, read_choice
from analysis.text_table import mean_and_std_text
from experiment.study_list import ARMS, STUDIES, TASKS, TUNING_SEEDS, Run, tuning
from utils.statistics import Interval, detectable_difference, holm, paired_p, student_interval

HEADLINE = (CONTROL, "late-0.25", "msam", "previous", "random", "sgd-decay", "sgd-lr", "sgd-half")
NOISE = "noise"  # random directions; where there are scaled ones, these
DIRECT = (  # what a direction buys over noise and over another one, and what a second pass buys
    ("previous", NOISE), ("msam", NOISE), (CONTROL, NOISE), ("msam", "previous"), (CONTROL, "previous"), (CONTROL, "msam"),
    (CONTROL, "late-0.25"), (CONTROL, "sgd-long"), ("previous", "sgd-half"), ("msam", "sgd-half"),
    (CONTROL, "sgd-half"), ("previous", "sgd-lr"), (CONTROL, "sgd-lr"), ("previous", "sgd-decay"), (CONTROL, "sgd-decay"),
    ("msam", "sgd-lr"), ("msam", "sgd-decay"), ("late-0.25", "sgd-half"), ("late-0.25", "sgd-decay"),
)  # fmt: skip
HEADLINES_NOTE = (
    "Test accuracy minus that of SGD in points, each with its own 95% interval. Bold: significant at "
    f"{LEVEL:.0%} after Holm's correction over all arms of its table. Passes are those of a training, those of SGD being 1."
)
NETWORKS_NOTE = (
    "Test accuracy minus that of SGD in points. Bold: significant at "
    f"{LEVEL:.0%} after Holm's correction over all arms of the network. RESULTS.md has the intervals."
)
NOT_RUN = "No run of it is in the ledger yet."


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = (rows[0], ["---"] * len(rows[0]), *rows[1:])
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def headlines(comparisons: dict[tuple[str, str], list[Compared]], other_methods: dict[str, str]) -> str:
    """Return what the main arms changed in the first cell of each task, a column per task; "" without runs.

    Args:
        comparisons: of all cells that have runs.
        other_methods: what arms changed on average over the methods that were trained with wrong labels.
    """
    columns: dict[str, dict[str, str]] = {}
    passes: dict[str, str] = {}
    for task in TASKS:
        title, rows = column_of(comparisons, task, TASKS[task].first, HEADLINE)
        if told := {arm: points(row.difference, row.p) for arm, row in rows.items()}:
            columns[f"{TASKS[task].title}: {title}"] = told
            passes = {arm: f"{row.passes:.3g}" for arm, row in rows.items()} | passes
    if other_methods:
        noise = TASKS["methods-noise"]
        columns[f"{noise.title}, their mean, {count_text(len(noise.seeds), 'seed')}"] = other_methods
    arms = [arm for arm in HEADLINE if any(arm in told for told in columns.values())]
    table = [["minus SGD (points)", "passes", *columns]]
    for arm in arms:
        table.append([ARMS[arm].title, passes.get(arm, ""), *(told.get(arm, "") for told in columns.values())])
    return markdown(table) if arms else ""


def networks(comparisons: dict[tuple[str, str], list[Compared]]) -> str:
    """Return what every arm changed in every network, a table for each task that has several; "" without runs.

    Args:
        comparisons: of all cells that have runs.
    """
    tables = []
    for task in TASKS:
        columns = {}
        for cell in sorted(TASKS[task].cells, key=lambda cell: TASKS[task].masks(cell)[1]):
            title, rows = column_of(comparisons, task, cell, TASKS[task].arms)
            if rows:
                columns[title] = rows
        if len(columns) < 2:
            continue
        table = [[TASKS[task].title, "passes", *columns]]
        for arm in (arm for arm in TASKS[task].arms if any(arm in rows for rows in columns.values())):
            found = [rows.get(arm) for rows in columns.values()]
            cost = next(row.passes for row in found if row)
            gains = [points(row.difference, row.p, interval=False) if row else "" for row in found]
            table.append([ARMS[arm].title, f"{cost:.3g}", *gains])
        tables.append(markdown(table))
    return "\n\n".join((NETWORKS_NOTE, *tables)) if tables else ""


def column_of(
    comparisons: dict[tuple[str, str], list[Compared]], task: str, cell: str, arms: Collection[str]
) -> tuple[str, dict[str, Compared]]:
    """Return the heading of a cell's column, with its seeds, and those of some arms that have enough pairs to be shown."""
    found = (row for row in comparisons.get((task, cell), []) if row.arm in arms)
    rows = {row.arm: row for row in found if len(row.differences) >= FEWEST}
    if not rows:
        return "", {}
    counts = {len(row.differences) for row in rows.values()}
    fewer = f"{min(counts)} to " if len(counts) > 1 else ""
    return f"{cell_title(task, cell)}, {fewer}{count_text(max(counts), 'seed')}", rows


def points(difference: Interval | None, p: float, interval: bool = True) -> str:
    """Return a difference, with its interval where it is wanted and there is one, bold where p says so."""
    if difference is None:
        return ""
    between = limits(difference) if interval else ""
    text = f"{difference.mean:+.2f}" + (f" ({between})" if between else "")
    return f"**{text}**" if p < LEVEL else text


def limits(difference: Interval) -> str:
    """Return the 95% interval of a difference; nothing for a single pair."""
    return "" if math.isnan(difference.low) else f"{difference.low:+.2f} to {difference.high:+.2f}"


def task_section(
    task: str, entries: dict[str, Entry], comparisons: dict[tuple[str, str], list[Compared]], choices: Path
) -> str:
    """Return all tables of a task.

    Args:
        task: its name.
        entries: its runs.
        comparisons: of all cells that have runs.
        choices: folder of the values that were chosen.
    """
    parts = [f"Every run: `{TASKS[task].flags}`, and SGD with momentum 0.9 where nothing else is said."]
    for cell, flags in TASKS[task].cells.items():
        if rows := comparisons.get((task, cell)):
            parts += [
                f"### {TASKS[task].title}: {cell_title(task, cell)}",
                f"`{flags}`",
                cell_table(rows),
                cell_notes(rows, lacking(task, cell, rows, choices)),
                *direct_table({row.arm: row.title for row in rows}, between(rows)),
            ]
    if tuned := tuning_table(task, entries, choices):
        parts += [f"### {TASKS[task].title}: what was tuned", tuned]
    return "\n\n".join(parts) if len(parts) > 1 else NOT_RUN


def cell_table(rows: list[Compared]) -> str:
    """Return the table of a cell: a row per arm; columns that would be empty are left out."""
    table = [
        {
            "arm": f"{row.title}, the positive control" if row.arm == CONTROL else row.title,
            "setting": row.setting,
            "passes": "" if math.isnan(row.passes) else f"{row.passes:.3g}",
            "test accuracy (%)": spread_text(final(row.finished, "test_top1")),
            "runs": str(len(row.finished)),
            "diverged": str(row.diverged or ""),
            "minus SGD (points)": f"{row.difference.mean:+.2f}" if row.difference else "",
            "95% interval": limits(row.difference) if row.difference else "",
            "pairs": str(len(row.differences) or ""),
            "p (Holm)": p_text(row.p),
            "largest eigenvalue": eigenvalue_text(row.eigenvalues, row.sharpness_p),
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


def eigenvalue_text(values: list[float], p: float) -> str:
    """Return the mean of eigenvalues and their standard deviation, bold where p says that they differ from those of SGD."""
    text = mean_and_std_text(values) if len(values) > 1 else f"{values[0]:.4g}" if values else ""
    return f"**{text}**" if p < LEVEL else text


def lacking(task: str, cell: str, rows: list[Compared], choices: Path) -> list[str]:
    """Return which arms the studies list more runs for than a cell has, and how many more."""
    runs = (run for study in STUDIES.values() for run in study())
    listed = [run for run in runs if (run.task, run.cell, run.tuning) == (task, cell, False)]
    files = {run.arm: choices / f"{run.tuned_arm}.json" for run in listed}
    left = Counter(run.arm for run in listed) - Counter({row.arm: len(row.runs) for row in rows})
    return [
        f"*{arm.title}* {left[name]}"
        for name, arm in TASKS[task].arms.items()
        if left[name]
        and not (files[name].exists() and read_choice(files[name])["value"] is None)  # all its values diverged
    ]


def cell_notes(rows: list[Compared], missing: list[str]) -> str:
    """Return what a cell's table says, what it could have said, and what it cost.

    Args:
        rows: of the table.
        missing: arms with runs that are yet to come, as `lacking` returns them.
    """
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
            f"a true difference of {detectable_difference(spread, count):.2f} points is found in 80% of cases at {LEVEL:.0%} without "
            f"a correction, and one of {detectable_difference(spread, count, level=LEVEL / len(tested)):.2f} points at Holm's "
            "strictest step."
        )
    if fitted := [entry["epochs"]["train_top1"][-1] for row in rows if row.arm == BASE for entry in row.finished]:
        notes.append(f"SGD ends at {mean(fitted):.1f}% of the training labels, as they were given.")
    if missing:
        notes.append(f"Runs that are not in the ledger yet: {', '.join(missing)}.")
    notes += diverged_note(rows)
    entries = [entry for row in rows for entry in row.runs.values()]
    notes.append(provenance(entries))
    return "\n".join(f"- {note}" for note in notes)


def diverged_note(rows: list[Compared]) -> list[str]:
    """Return the note on runs that diverged, if any did."""
    count = sum(row.diverged for row in rows)
    verb, arms = ("is", "its arm") if count == 1 else ("are", "their arms")
    note = f"{count_text(count, 'run')} diverged, and {verb} in no mean and no pair, which favours {arms}."
    return [note] if count else []


def direct_table(titles: dict[str, str], differences: Callable[[str, str], Sequence[float]]) -> list[str]:
    """Return a table of the differences between two arms neither of which is SGD; nothing without one.

    Args:
        titles: of the arms that there are.
        differences: of two arms, in pairs.
    """
    noise = "random-scaled" if "random-scaled" in titles else "random"
    both = [(arm, noise if other == NOISE else other) for arm, other in DIRECT]
    told = {pair: values for pair in both if titles.keys() >= set(pair) and len(values := differences(*pair)) >= FEWEST}
    corrected = holm([paired_p(values, ROUNDING) for values in told.values()])
    table = [["in pairs", "difference (points)", "95% interval", "pairs", "p (Holm)"]]
    for ((arm, other), values), p in zip(told.items(), corrected, strict=True):
        difference, title = student_interval(values), f"{titles[arm]} minus {titles[other]}"
        table.append([title, f"{difference.mean:+.2f}", limits(difference), str(len(values)), p_text(p)])
    return [markdown(table)] if told else []


def between(rows: list[Compared]) -> Callable[[str, str], Sequence[float]]:
    """Return a function that gives the differences of two arms of a cell."""
    runs = {row.arm: row.runs for row in rows}
    return lambda arm, other: pairs(runs[arm], runs[other])


def provenance(entries: Iterable[Entry]) -> str:
    """Return what runs cost, and of which commits and devices they are."""
    entries = list(entries)

    def distinct(name: str) -> list[str]:
        return sorted({entry[name] for entry in entries})

    devices = distinct("device")
    commits = sorted(
        {(commit or "unknown")[:7] for e in entries for commit in (e["commit"], *e.get("earlier_commits", ()))}
    )
    on_cpus = all(device.startswith("cpu") for device in devices)
    hours = core_hours(entries) if on_cpus else sum(entry["seconds"] for entry in entries) / 3600
    text = (
        f"Cost: {hours:.1f} {'core-hours' if on_cpus else 'hours of runs'}, {count_text(len(entries), 'run')}; {', '.join(devices)}; "
        f"torch {', '.join(distinct('torch'))}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    )
    kinds = len(distinct("mathematics"))
    return f"{text}, which compute in {kinds} ways (the files that decide figures differ)." if kinds > 1 else f"{text}."


def tuning_table(task: str, entries: dict[str, Entry], choices: Path) -> str:
    """Return the held-out accuracies by which values were chosen; "" where there are none."""
    rows, tried, at_an_end = [], [], []
    for name, arm in TASKS[task].arms.items():
        trials = [run for run in tuning(task, (name,)) if run.name in entries]
        if not trials:
            continue
        chosen = chosen_value(trials, entries, choices / f"{name}.json")
        held_out = best_value(trials, entries)["held_out"]
        cells = [
            f"{value:g}: {held_out_text(held_out, value, trials)}" if f"{value:g}" in held_out else ""
            for value in arm.values
        ]
        bold = [f"**{text}**" if value == chosen else text for value, text in zip(arm.values, cells, strict=True)]
        rows.append([arm.title, arm.setting.replace("-", " "), *bold])
        tried += [entries[run.name] for run in trials]
        if chosen in (arm.values[0], arm.values[-1]):
            at_an_end.append(f"*{arm.title}*")
    if not rows:
        return ""
    width = max(map(len, rows))
    table = markdown(
        [
            ["arm", "setting", "value: held-out accuracy (%)", *[""] * (width - 3)],
            *(row + [""] * (width - len(row)) for row in rows),
        ]
    )
    cell, seeds = cell_title(task, TASKS[task].first), " and ".join(map(str, TUNING_SEEDS))
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


def chosen_value(trials: list[Run], entries: dict[str, Entry], file: Path) -> float | None:
    """Return the value that stands in an arm's runs; None as long as none is chosen."""
    if file.exists():
        return read_choice(file)["value"]
    whole = len(trials) == len(TUNING_SEEDS) * len(TASKS[trials[0].task].arms[trials[0].arm].values)
    return best_value(trials, entries)["value"] if whole else None


def held_out_text(held_out: dict[str, float | None], value: float, trials: list[Run]) -> str:
    """Return a held-out accuracy, and of how many runs it is where some are missing."""
    accuracy, count = held_out[f"{value:g}"], sum(run.value == value for run in trials)
    missing = f" ({count_text(count, 'run')})" if count < len(TUNING_SEEDS) else ""
    return ("diverged" if accuracy is None else f"{accuracy:.2f}") + missing
