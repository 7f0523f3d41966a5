"""Confidence intervals of small samples."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean with the limits of its 95% confidence interval."""

    mean: float
    low: float
    high: float


def student_interval(samples: Sequence[float]) -> Interval:
    """Return the mean of independent samples with its 95% confidence interval by Student's t.

    A single sample has no spread: its limits are NaN.
    """
    from scipy.stats import t as student  # here, because this import alone takes a second

    center, count = mean(samples), len(samples)
    half = float(student.ppf(0.975, count - 1)) * stdev(samples) / math.sqrt(count) if count > 1 else math.nan
    return Interval(center, center - half, center + half)
