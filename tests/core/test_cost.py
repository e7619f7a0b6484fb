from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.cost import NANO, direct_cost, format_usd


def test_a_whole_run_of_an_hour_costs_the_price_of_an_hour() -> None:
    assert direct_cost(2.5, 3600.0, 8, 8) == 2_500_000_000


def test_a_request_pays_its_share_of_the_rows() -> None:
    assert direct_cost(3600.0, 0.001, 1, 4) == 250_000
    # Padding is paid for by those who are served.
    assert direct_cost(3600.0, 0.001, 3, 4) == 750_000


@pytest.mark.parametrize(("price", "run_s"), [(0.0, 1.0), (2.5, 0.0)])
def test_what_costs_nothing(price: float, run_s: float) -> None:
    assert direct_cost(price, run_s, 1, 1) == 0


@given(
    st.floats(0, 100),
    st.floats(0, 60),
    st.lists(st.integers(1, 64), min_size=1, max_size=64),
)
def test_the_shares_of_a_run_add_up_to_its_price(
    price: float, run_s: float, rows: list[int]
) -> None:
    """Each is rounded, so by no more than half a nano-dollar a request."""
    run_rows = sum(rows)
    exact = Fraction(price) * NANO / 3600 * Fraction(run_s)
    paid = sum(direct_cost(price, run_s, r, run_rows) for r in rows)
    assert abs(paid - exact) <= Fraction(len(rows), 2) + Fraction(1, 1000) + exact / 10**12


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "0.000000000"),
        (1, "0.000000001"),
        (999_999_999, "0.999999999"),
        (1_000_000_000, "1.000000000"),
        (12_345_678_901_234, "12345.678901234"),
    ],
)
def test_amounts_as_text(nano: int, text: str) -> None:
    assert format_usd(nano) == text


@given(st.integers(0, 10**24))
def test_text_is_exact(nano: int) -> None:
    text = format_usd(nano)
    assert Decimal(text) * NANO == nano
    assert len(text.partition(".")[2]) == 9
