"""Student's interval against figures from a printed table."""

import math

import pytest

from utils.statistics import student_interval


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
