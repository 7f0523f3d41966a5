"""Compare the arms of a study with SGD, by the figures in its ledger."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiment.study_list import TASKS, Arm, Run
from utils.statistics import Interval, holm, paired_p, student_interval

Entry = dict[str, Any]
BASE, CONTROL = "sgd", "sam"  # what arms are compared with, and the one that is known to gain
LEVEL = 0.05
ROUNDING = 1e-3  # of accuracies in the ledger, in points: far less than an image, and more than its six digits lose
FEWEST = 3  # pairs that a picture or a headline needs: the interval of two is as wide as the picture


@dataclass(frozen=True)
class Compared:
    """The runs of an arm in a cell.

    Attributes:
        arm, title: its name and how it is shown.
        setting: what it was trained with beyond its title, such as `rho 0.2`; "" for nothing.
        runs: entries of all its runs by seed; those that diverged are in no figure.
        differences: test accuracies minus those of SGD with the same seed, images, kind of device and precision, in points.
        difference: their mean and its 95% interval by Student's t; None without pairs.
        p: of Student's paired t test, corrected by Holm's method over the arms of the cell; NaN for fewer than two pairs.
        sharpness_p: the same of the largest eigenvalue, whose differences are in pairs too.
        passes: forward and backward passes of a training, a pass per step for the task's epochs being 1: the runs' median; NaN
            where every run diverged.
    """

    arm: str
    title: str
    setting: str
    runs: dict[int, Entry]
    differences: tuple[float, ...]
    difference: Interval | None
    p: float
    sharpness_p: float
    passes: float

    @property
    def finished(self) -> list[Entry]:
        """The runs that did not diverge."""
        return [entry for entry in self.runs.values() if entry["state"] == "finished"]

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return len(self.runs) - len(self.finished)

    @property
    def eigenvalues(self) -> list[float]:
        """Largest eigenvalues of the Hessian on training images, of the runs for which it was measured."""
        return [value for entry in self.finished if (value := largest_eigenvalue(entry)) is not None]

    @property
    def verdict(self) -> int:
        """1 for a gain and -1 for a loss that is significant after the correction, 0 for neither."""
        return int(math.copysign(1, self.difference.mean)) if self.difference and self.p < LEVEL else 0


def compare(task: str, cell: str, entries: dict[str, Entry]) -> list[Compared]:
    """Compare the arms of a cell that have runs: SGD and two-step SAM first, the others in the study's order.

    Args:
        task, cell: names.
        entries: of the task, by the names of the runs.
    """
    arms = TASKS[task].arms
    runs = {}
    for arm in sorted(arms, key=lambda name: (BASE, CONTROL, name).index(name)):
        planned = {seed: Run(task, cell, arm, seed).name for seed in TASKS[task].seeds_of(cell)}
        if found := {seed: entries[name] for seed, name in planned.items() if name in entries}:
            runs[arm] = found
    base = runs.get(BASE, {})
    differences = {arm: pairs(found, base) if arm != BASE else () for arm, found in runs.items()}
    sharper = {arm: pairs(found, base, largest_eigenvalue) if arm != BASE else () for arm, found in runs.items()}
    p, sharpness_p = (
        dict(zip(runs, holm([paired_p(values, ROUNDING) for values in each.values()]), strict=True))
        for each in (differences, sharper)
    )
    return [
        Compared(
            arm, arms[arm].title, setting_text(arms[arm], found.values()), found, differences[arm],
            student_interval(differences[arm]) if differences[arm] else None, p[arm], sharpness_p[arm],
            passes(found.values(), TASKS[task].epochs),
        )
        for arm, found in runs.items()
    ]  # fmt: skip


def setting_text(arm: Arm, entries: Iterable[Entry]) -> str:
    """Return what an arm's flag of interest was in its runs: `rho 0.2`, `lr 0.05`; "" for an arm without one."""
    name = arm.tuned.removeprefix("--").replace("-", "_")
    values = {entry["flags"].get(name) for entry in entries} - {None}
    return ", ".join(f"{arm.setting.replace('-', ' ')} {value:.3g}" for value in sorted(values))


def passes(entries: Iterable[Entry], epochs: int) -> float:
    """Return the median cost of the runs that finished in passes per step, times their length as a multiple of `epochs`."""
    costs = [
        entry["final"]["passes_per_step"] * entry["epochs"]["epoch"][-1] / epochs
        for entry in entries
        if entry["state"] == "finished"
    ]
    return median(costs) if costs else math.nan


def accuracy(entry: Entry) -> float:
    """Return the test accuracy after the last epoch of a finished run, in percent."""
    return entry["final"]["test_top1"]


def largest_eigenvalue(entry: Entry) -> float | None:
    """Return the largest eigenvalue of the Hessian on training images at a run's end; None where it was not measured."""
    return entry.get("sharpness", {}).get("train")


def pairs(
    runs: dict[int, Entry], base: dict[int, Entry], figure: Callable[[Entry], float | None] = accuracy
) -> tuple[float, ...]:
    """Return differences in a figure between finished runs of the same seed that are alike, as far as both have it."""
    both = [
        (figure(runs[seed]), figure(base[seed]))
        for seed in runs
        if seed in base
        and runs[seed]["state"] == base[seed]["state"] == "finished"
        and are_alike(runs[seed], base[seed])
    ]
    return tuple(ours - theirs for ours, theirs in both if ours is not None and theirs is not None)


def are_alike(one: Entry, other: Entry) -> bool:
    """Return whether two runs are of the same images, kind of device (any CPU, any GPU) and precision: each moves figures."""

    def circumstances(entry: Entry) -> tuple:
        return entry["images"], entry["device"].partition(" ")[0], entry["flags"].get("precision")

    return circumstances(one) == circumstances(other)


def final(entries: Iterable[Entry], name: str) -> list[float]:
    """Return a figure of finished runs."""
    return [entry["final"][name] for entry in entries]


def core_hours(entries: Iterable[Entry]) -> float:
    """Return how long runs took, times the threads that each had on a CPU."""
    return sum(entry["seconds"] * threads(entry["device"]) for entry in entries) / 3600


def threads(device: str) -> int:
    """Return the threads that a device's description names; 1 for a GPU."""
    found = re.search(r"(\d+) threads", device)
    return int(found[1]) if found else 1


def cell_title(task: str, cell: str) -> str:
    """Return the title of a cell: `90% sparse, random`, `dense` or `98% sparse, rigl, batch 64`."""
    method, sparsity = TASKS[task].masks(cell)
    batch = re.search(r"--batch-size (\d+)", TASKS[task].cells[cell])
    kind = "dense" if method == "none" else f"{100 * sparsity:g}% sparse, {method}"
    return f"{kind}, batch {batch[1]}" if batch else kind
