"""When masks change during training, and by how much."""

import math
from dataclasses import dataclass


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

    def due(self, step: int) -> bool:
        """Return whether masks change after a step."""
        done = step + 1
        return done == self.last or (done < self.last and done % self.interval == 0)

    def fraction(self, step: int) -> float:
        """Return how far a step is on the way to the last change, from 0 to 1."""
        return min(1.0, (step + 1) / self.last)


def cubic(fraction: float, final: float) -> float:
    """Return the sparsity on the way from 0 to `final` (Zhu and Gupta 2018, equation 1)."""
    return final * (1 - (1 - fraction) ** 3)


# How much of the drop fraction is left, as a function of the fraction of the way to the last change.


def constant(fraction: float) -> float:
    """Return 1 before the last change and 0 there (Mocanu et al. 2018)."""
    return float(fraction < 1)


def cosine(fraction: float) -> float:
    """Return a value that falls from 1 to 0 along a cosine (Dettmers and Zettlemoyer 2019; Evci et al. 2020, sec. 3)."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


def steps(fraction: float) -> float:
    """Return 1, from the middle on 1/2, from three quarters on 1/4, and 0 at the end."""
    return 0.0 if fraction >= 1 else 0.25 if fraction >= 0.75 else 0.5 if fraction >= 0.5 else 1.0
