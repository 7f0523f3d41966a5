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


def paired_p(differences: Sequence[float], rounding: float = 0.0) -> float:
    """Return the two-sided p-value of Student's t test that paired differences have the mean 0.

    It is NaN where they have no spread beyond their rounding, as a single one has none.
    """
    from scipy.stats import t as student

    if len(differences) < 2 or (spread := stdev(differences)) <= rounding:
        return math.nan
    t = mean(differences) / (spread / math.sqrt(len(differences)))
    return float(2 * student.sf(abs(t), len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of one family for their number by Holm's step-down method (Holm 1979); NaNs are not of it."""
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[place] = highest
    return corrected


def detectable_difference(spread: float, pairs: int, power: float = 0.8, level: float = 0.05) -> float:
    """Return the smallest true difference that a two-sided paired t test finds with a given power.

    Args:
        spread: standard deviation of the paired differences.
        pairs: how many there are, at least two.
        power: the probability of finding it.
        level: of significance.
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import chi2, norm
    from scipy.stats import t as student

    # The noncentral t distribution as a mean over the estimated spread: scipy's own is NaN far from its centre.
    freedom, limit = pairs - 1, student.ppf(1 - level / 2, pairs - 1)
    needed = limit * np.sqrt(chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)

    def excess(shift: float) -> float:
        return float(np.mean(norm.cdf(shift - needed) + norm.cdf(-shift - needed))) - power

    return spread * brentq(excess, 0.0, 5 * limit + 10) / math.sqrt(pairs)
