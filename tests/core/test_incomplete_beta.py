from __future__ import annotations

from math import exp, inf, log, log1p, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betainc, betaincc, betaln

from serving.core.incomplete_beta import log_beta, log_mass_above, log_mass_below

SMALLEST = 1e-290  # below, scipy rounds

shapes = st.floats(0.05, 1e5)
points = st.floats(1e-6, 1 - 1e-6)


@given(a=shapes, b=shapes, deviations=st.floats(-30, 30))
def test_agrees_with_scipy_wherever_scipy_has_a_number(a, b, deviations):
    mean, deviation = a / (a + b), sqrt(a * b / (a + b + 1)) / (a + b)
    x = min(max(mean + deviations * deviation, 1e-6), 1 - 1e-6)
    total, below, above = betaln(a, b), betainc(a, b, x), betaincc(a, b, x)

    assert log_beta(a, b) == pytest.approx(total, rel=1e-9, abs=1e-8)
    if below > SMALLEST:
        assert log_mass_below(a, b, x) == pytest.approx(total + log(below), rel=1e-9, abs=1e-7)
    if above > SMALLEST:
        assert log_mass_above(a, b, x) == pytest.approx(total + log(above), rel=1e-9, abs=1e-7)


@given(a=shapes, b=shapes, x=points)
def test_both_sides_add_up_to_the_whole(a, b, x):
    total = log_beta(a, b)
    below, above = log_mass_below(a, b, x) - total, log_mass_above(a, b, x) - total
    assert exp(below) + exp(above) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("n", [1e6, 1e9, 1e12])
def test_tails_that_underflow_are_still_known(n):
    assert betaincc(1, n, 0.02) == 0
    assert log_mass_above(1, n, 0.02) == pytest.approx(n * log1p(-0.02) - log(n))
    assert log_mass_below(n, 1, 0.02) == pytest.approx(n * log(0.02) - log(n))


@pytest.mark.parametrize("n", [1e6, 1e9, 1e11])
def test_at_the_mean_of_very_many_each_side_is_half(n):
    total = log_beta(0.02 * n, 0.98 * n)
    assert log_mass_above(0.02 * n, 0.98 * n, 0.02) - total == pytest.approx(log(0.5), abs=0.01)
    assert -inf < log_mass_below(0.02 * n, 0.98 * n, 0.02) - total < 0
