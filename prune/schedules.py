"""When masks change during training, and by how much."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

CHANGES = 20  # of the masks, that a training has at least where nobody says when they change


def parse_interval(value: str | int) -> int | str:
    """Return an interval between two changes: a number of steps, or epochs as `1e` or `0.5e`.

    Raises:
        ValueError: it is neither.
    """
    text = str(value)
    if re.fullmatch(r"0*[1-9]\d{0,17}", text):
        return int(text)
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?e", text) and float(text[:-1]) > 0:
        return text
    raise ValueError(f"has to be a whole number of steps above 0, or epochs such as 1e, not '{text}'")


def interval_steps(interval: float | str, steps_per_epoch: int | None) -> int:
    """Return the steps of an interval. Raises ValueError for one in epochs where nobody said how long they are."""
    if not isinstance(interval, str) or not interval.endswith("e"):
        return int(interval)
    if steps_per_epoch is None:
        raise ValueError(
            f"masks change every {interval}: give steps_per_epoch, or update_interval as a number of steps"
        )
    return max(1, round(float(interval[:-1]) * steps_per_epoch))


@dataclass(frozen=True)
class Timing:
    """The steps, counted from 0, after which masks change.

    Attributes:
        total_steps: of training.
        interval: steps between two changes.
        stop: fraction of training after which the masks stay; the last change comes exactly there.
    """

    total_steps: int
    interval: int
    stop: float

    @property
    def last(self) -> int:
        """Return the number of steps before the last change."""
        return max(1, round(self.stop * self.total_steps))

    @classmethod
    def until(cls, stop: float, total_steps: int) -> "Timing":
        """Return the timing of one change, the last. Raises ValueError for a training that is too short for it."""
        timing = cls(total_steps, total_steps, stop)
        if timing.last < 2:
            raise ValueError(f"masks would never change: they stay from step 1 of {total_steps} on; train for longer")
        return timing

    def every(self, interval: int, usual: bool, warn: Callable[[str], None]) -> "Timing":
        """Return the timing with changes at an interval, too.

        Args:
            interval: steps between two changes.
            usual: it is the method's default, which is shortened where a training has too few changes.
            warn: is called with a sentence where it is shortened.

        Raises:
            ValueError: an interval that was asked for and leaves no change before the last.
        """
        changes = self.last - 1  # at most, before the last
        shorter = max(1, changes // CHANGES)
        stay = f"before they stay, from step {self.last} of {self.total_steps} on"
        if usual and shorter < interval:
            warn(
                f"masks change every {shorter} steps, {changes // shorter} times {stay}; every {interval} steps, as usual, it "
                f"would be {changes // interval}"
            )
            interval = shorter
        elif interval >= self.last:
            raise ValueError(
                f"masks would never change {stay}: their update interval is {interval} steps; take update_interval={shorter}, "
                f"which gives {changes // shorter} changes, or train for longer"
            )
        return replace(self, interval=interval)

    def due(self, step: int) -> bool:
        """Return whether masks change after a step."""
        done = step + 1
        return done == self.last or (done < self.last and done % self.interval == 0)

    def number(self, step: int) -> int:
        """Return the number of the change after a step, counted from 1."""
        return (step + 1) // self.interval

    def fraction(self, step: int) -> float:
        """Return how far a step is on the way to the last change, from 0 to 1."""
        return min(1.0, (step + 1) / self.last)


# How much of the final sparsity there is, as a function of the fraction of the way to the last change, and of its number.


def cubic(fraction: float, number: int = 0) -> float:
    """Return a share that rises from 0 to 1, fast at first (Zhu and Gupta 2018, equation 1)."""
    return 1 - (1 - fraction) ** 3


def alternating(fraction: float, number: int) -> float:
    """Return 1 after every odd change and the last one, and 0 between them (Peste et al. 2021)."""
    return float(fraction >= 1 or number % 2 == 1)


def at_end(fraction: float, number: int) -> float:
    """Return 0 before the last change and 1 there."""
    return float(fraction >= 1)


# How much of the drop fraction is left, as a function of the fraction of the way to the last change.


def constant(fraction: float) -> float:
    """Return 1 before the last change and 0 there (Mocanu et al. 2018)."""
    return float(fraction < 1)


def cosine(fraction: float) -> float:
    """Return a value that falls from 1 to 0 along a cosine (Dettmers and Zettlemoyer 2019; Evci et al. 2020, sec. 3)."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


def steps(fraction: float) -> float:
    """Return 1, from three quarters on 1/2, and 0 at the end (MEST's code: from epochs 90 and 120 of 160)."""
    return 0.0 if fraction >= 1 else 0.5 if fraction >= 0.75 else 1.0
