"""Intervals, p-values and power against printed figures and other formulas."""

import math

import pytest
from scipy.stats import nct
from scipy.stats import t as student

from utils.statistics import detectable_difference, holm, paired_p, student_interval


def test_the_interval_is_students():
    mean, low, high = student_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t at 0.975 with 4 degrees of freedom; variance 2.5
    assert mean == 3
    assert (low, high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_a_single_sample_has_a_mean_and_no_interval():
    mean, low, high = student_interval([7.0])
    assert mean == 7
    assert math.isnan(low)
    assert math.isnan(high)


def test_p_is_that_of_the_t_table():
    differences = [1.0, 2.0, 3.0, 4.0, 5.0]
    shift = 3 - 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # brings t to the 0.975 quantile
    assert paired_p([d - shift for d in differences]) == pytest.approx(0.05, rel=1e-5)
    assert paired_p([shift - d for d in differences]) == pytest.approx(0.05, rel=1e-5)


def test_differences_without_spread_have_no_p():
    assert math.isnan(paired_p([2.0]))
    assert math.isnan(paired_p([2.0, 2.0]))
    nearly = [88.45 - 87.32, 91.13 - 90.00]  # equal but for the last bits
    assert math.isnan(paired_p(nearly, rounding=1e-3))
    assert paired_p([1.0, 1.02], rounding=1e-3) < 0.05


def test_p_values_are_corrected_as_holm_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # Wikipedia: two are rejected at 5%
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    first, second, third = holm([0.02, math.nan, 0.03])
    assert (first, third) == pytest.approx((0.04, 0.04))  # the family is of two
    assert math.isnan(second)


@pytest.mark.parametrize(("pairs", "effect"), [(34, 0.4950), (10, 0.9960), (3, 3.2640)])
def test_the_detectable_difference_is_that_of_the_noncentral_t(pairs, effect):
    found = detectable_difference(2.0, pairs)
    assert found == pytest.approx(2 * effect, rel=1e-3)
    freedom, shift = pairs - 1, found / 2 * math.sqrt(pairs)
    limit = student.ppf(0.975, freedom)
    assert nct.sf(limit, freedom, shift) == pytest.approx(0.8, abs=1e-4)
