"""Measuring in turns, and a table of what came out with the targets it is held to."""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from scipy.stats import binom


def measure(turns: int, tasks: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each task in each turn, after one turn that is not counted; every other turn goes backwards.

    So no task always follows the same one, and what slows down or heats up meanwhile favours none.
    """
    seconds = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in list(tasks.items())[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def interval_of_median(samples: list[float]) -> tuple[float, float]:
    """The samples between which the median lies with 95% certainty, whatever their distribution; all if they are few."""
    place = max(1, int(binom.ppf(0.025, len(samples), 0.5)))
    return sorted(samples)[place - 1], sorted(samples)[-place]


class Report:
    """Figures by name, each the samples of all turns, and the targets that they are held to."""

    def __init__(self):
        self.figures: dict[str, dict] = {}
        self.targets: list[dict] = []

    def add(self, name: str, samples: list[float] | float, unit: str) -> float:
        samples = samples if isinstance(samples, list) else [samples]
        low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        middle = median(samples)
        self.figures[name] = {"median": middle, "quartiles": [low, high], "unit": unit, "samples": samples}
        spread = f"({_shown(low)} to {_shown(high)})" if len(samples) > 1 else ""
        print(f"{name:<72}{_shown(middle):>10} {unit:<12}{spread}".rstrip(), flush=True)
        return middle

    def target(self, text: str, name: str, most: float | None = None, least: float | None = None) -> None:
        """Hold the figure of that name to a limit. It is open where the samples leave the median on either side of it."""
        value, (low, high) = self.figures[name]["median"], interval_of_median(self.figures[name]["samples"])
        met = value <= most if most is not None else value >= least
        limit = least if most is None else most
        found = {"target": text, "value": value, "interval": [low, high], "open": low <= limit <= high and low < high}
        self.targets.append(found | {"met": met})

    def show_targets(self) -> None:
        print()
        for target in self.targets:
            low, high = map(_shown, target["interval"])
            between = f" ({low} to {high}{', which leaves it open' if target['open'] else ''})" if low != high else ""
            verdict = "met" if target["met"] else "not met"
            print(f"{target['target']}: {_shown(target['value'])}{between}, {verdict}")


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
