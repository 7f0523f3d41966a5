"""Measuring in turns, and a table of what came out with the targets it is held to."""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch


def measure(turns: int, tasks: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each task in each turn, after one turn that is not counted."""
    seconds = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


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

    def target(self, text: str, value: float, most: float | None = None, least: float | None = None) -> None:
        met = value <= most if most is not None else value >= least
        self.targets.append({"target": text, "value": value, "met": met})

    def show_targets(self) -> None:
        print()
        for target in self.targets:
            print(f"{target['target']}: {_shown(target['value'])}, {'met' if target['met'] else 'not met'}")


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
