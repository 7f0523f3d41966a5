"""Fill the pages from the ledger.

What stands between `<!-- ledger: NAME -->` and `<!-- /ledger -->` in a page is replaced by the block of that name.
"""

import os
import re
import sys
from pathlib import Path

from analysis import results_pictures
from analysis.command import writing_to
from analysis.comparison import Compared, Entry, compare
from analysis.labels import count_text
from analysis.ledger import Ledger, differing_flags
from analysis.results_methods import means_over_methods, methods_table, noise_table
from analysis.results_tables import HEADLINES_NOTE, headlines, networks, task_section
from analysis.study import CHOSEN, read_choice
from experiment.study_list import DECAY_TASKS, STUDIES, TASKS, Run
from utils.errors import UsageError
from utils.files import write_text_atomically

PAGES = ("README.md", "RESULTS.md", "docs/one-step.md")
PICTURES = Path("docs/results")
OPENING = re.compile(r"^<!-- ledger: (.*) -->$", re.MULTILINE)
BLOCK = re.compile(r"^<!-- ledger: (\S+) -->\n(?:(?!<!-- ledger).*\n)*?<!-- /ledger -->$", re.MULTILINE)
NO_COMPARISON = "No comparison is in the ledger yet."
COMPARED = tuple(name for name in TASKS if name not in ("methods", "methods-noise"))


def render(root: Path, results: Path, check: bool = False) -> list[str]:
    """Bring the pages and pictures of a checkout up to date with the ledger.

    Args:
        root: of the checkout.
        results: the ledger.
        check: change nothing.

    Returns:
        What differed.

    Raises:
        UsageError: a marker or a file of the ledger is wrong, or is not what its name says.
    """
    ledgers = {task: Ledger(results / task, None).entries for task in TASKS}
    ledgers = {task: listed_entries(task, entries, results / task / CHOSEN) for task, entries in ledgers.items()}
    comparisons = compare_all(ledgers)
    first = {key: rows for key, rows in comparisons.items() if key[0] not in DECAY_TASKS}
    with_decay = {key: rows for key, rows in comparisons.items() if key[0] in DECAY_TASKS}
    pictures = {
        "frontier": results_pictures.frontier(first),
        "sparsities": results_pictures.sparsities(comparisons),
    }
    blocks = {
        "headlines": first_lines(first, means_over_methods(ledgers["methods-noise"])),
        "headlines-decay": headlines(with_decay, {}) or NO_COMPARISON,
        "networks": networks(comparisons) or NO_COMPARISON,
        "methods": methods_table(ledgers["methods"]),
        "methods-noise": noise_table(ledgers["methods-noise"]),
        **{task: task_section(task, ledgers[task], comparisons, results / task / CHOSEN) for task in COMPARED},
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
            with writing_to(page, ""):
                write_text_atomically(page, text)
    return changed


def first_lines(comparisons: dict[tuple[str, str], list[Compared]], other_methods: dict[str, str]) -> str:
    """Return what came out in a table, and how to read it."""
    table = headlines(comparisons, other_methods)
    return f"{HEADLINES_NOTE}\n\n{table}" if table else NO_COMPARISON


def listed_entries(task: str, entries: dict[str, Entry], choices: Path) -> dict[str, Entry]:
    """Return the runs of a task that the studies list, which are those of tables, and say that there are others.

    Args:
        task: its name.
        entries: its runs.
        choices: folder of the values that were chosen.

    Raises:
        UsageError: one would stand in a row of other flags.
    """
    listed = {run.name: run for study in STUDIES.values() for run in study() if run.task == task}
    for name, entry in entries.items():
        if run := listed.get(name):
            refuse_other_flags(run, entry, choices)
    if unlisted := [name for name in entries if name not in listed]:
        print(
            f"note: results/{task} has {count_text(len(unlisted), 'run')} that experiment/study_list.py does not list, "
            f"such as '{unlisted[0]}': in no table",
            file=sys.stderr,
        )
    return {name: entry for name, entry in entries.items() if name in listed}


def refuse_other_flags(run: Run, entry: Entry, choices: Path) -> None:
    """Raise UsageError for an entry with the name of a run and not with its flags or the value that was chosen for it."""
    source, file, unknown = "experiment/study_list.py", choices / f"{run.tuned_arm}.json", ""
    if run.value is None and run.tuned_arm:
        if file.exists():
            value, source = read_choice(file)["value"], f"experiment/study_list.py and '{file}'"
            run = run if value is None else run.with_value(value)  # None: all diverged, and no run has a value
        else:  # as in tuning that is not finished
            unknown = TASKS[run.task].arms[run.arm].tuned.removeprefix("--").replace("-", "_")
    if differing := [name for name in differing_flags(tuple(run.flags()), entry["flags"]) if name != unknown]:
        raise UsageError(
            f"'{run.task}/{run.name}.json' of the ledger differs from {source} in {', '.join(differing)}: it would stand in a "
            "row of other runs; remove or rename it"
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
