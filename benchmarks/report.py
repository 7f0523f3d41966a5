"""Measure tasks in turns, and print the figures with the targets they are held to."""

import math
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from scipy.stats import binom


def measure(turns: int, tasks: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each task in each turn; one turn before them is not counted.

    Every other turn runs the tasks in reverse order: no task always follows the same one, and a machine that slows down
    or heats up favours none.

    Args:
        turns: how many count.
        tasks: what to run, by name.
        device: a CUDA device is waited for after each task.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
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
    """Divide two lists of samples, turn by turn."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def interval_of_median(samples: list[float]) -> tuple[float, float]:
    """Return the two samples between which the median lies with 95% confidence, whatever the distribution.

    Of five samples or fewer these are the smallest and the largest, with less confidence: 94% of five.
    """
    rank = max(1, int(binom.ppf(0.025, len(samples), 0.5)))
    return sorted(samples)[rank - 1], sorted(samples)[-rank]


class Report:
    """Figures by name, each with the samples of all turns, and the targets they are held to.

    Attributes:
        figures: median, quartiles, unit and samples of each figure.
        targets: text, value, interval of the median, and whether the target is met or open.
    """

    def __init__(self) -> None:
        self.figures: dict[str, dict] = {}
        self.targets: list[dict] = []

    def add(self, name: str, samples: list[float] | float, unit: str) -> float:
        """Keep and print a figure; return its median."""
        samples = samples if isinstance(samples, list) else [samples]
        low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        middle = median(samples)
        self.figures[name] = {"median": middle, "quartiles": [low, high], "unit": unit, "samples": samples}
        spread = f"({four_digits(low)} to {four_digits(high)})" if len(samples) > 1 else ""
        print(f"{name:<72}{four_digits(middle):>10} {unit:<12}{spread}".rstrip(), flush=True)
        return middle

    def target(self, text: str, name: str, most: float = math.inf, least: float = -math.inf) -> None:
        """Hold a figure to a limit.

        The target is open where the interval of the median contains the limit.

        Args:
            text: what is asked for, as it is printed.
            name: of the figure.
            most: its upper limit.
            least: its lower limit.
        """
        value, (low, high) = self.figures[name]["median"], interval_of_median(self.figures[name]["samples"])
        is_open = low < high and any(low <= limit <= high for limit in (least, most))
        target = {"target": text, "value": value, "interval": [low, high], "open": is_open}
        self.targets.append(target | {"met": least <= value <= most})

    def show_targets(self) -> None:
        """Print each target with its value and whether it is met."""
        print()
        for target in self.targets:
            low, high = map(four_digits, target["interval"])
            between = f" ({low} to {high}{', which leaves it open' if target['open'] else ''})" if low != high else ""
            verdict = "met" if target["met"] else "not met"
            print(f"{target['target']}: {four_digits(target['value'])}{between}, {verdict}")


def four_digits(value: float) -> str:
    """Return a number as text with four significant digits, or as a whole number from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
