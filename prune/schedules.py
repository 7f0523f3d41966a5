"""When masks change during training, and by how much."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """The steps, counted from 0, after which masks change.

    Attributes:
        total_steps: of training.
        interval: a change every so many steps,
        stop: until this share of training; the last change comes exactly there.
    """

    total_steps: int
    interval: int = 100
    stop: float = 0.75

    @property
    def last(self) -> int:
        return max(1, round(self.stop * self.total_steps))

    def due(self, step: int) -> bool:
        done = step + 1
        return done == self.last or (done < self.last and done % self.interval == 0)

    def fraction(self, step: int) -> float:
        """From 0 to 1 at the last change."""
        return min(1.0, (step + 1) / self.last)


def cubic(progress: float, final: float) -> float:
    """Pruner on the way from 0 to final (Zhu and Gupta 2018, equation 1)."""
    return final * (1 - (1 - progress) ** 3)


def constant(progress: float) -> float:
    """The whole drop fraction until the last change (Mocanu et al. 2018), none there."""
    return float(progress < 1)


def cosine(progress: float) -> float:
    """Share of the drop fraction, from 1 to 0 (Dettmers and Zettlemoyer 2019; Evci et al. 2020, section 3)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def steps(progress: float) -> float:
    """Share of the drop fraction: whole, half from the middle on, a quarter from three quarters on, then none."""
    return 0.0 if progress >= 1 else 0.25 if progress >= 0.75 else 0.5 if progress >= 0.5 else 1.0
