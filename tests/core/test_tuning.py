"""What `serving tune` tries, what of it is worth showing, and what it chooses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.tuning import (
    AS_EXPORTED,
    Measurement,
    Objective,
    Setting,
    choose,
    frontier,
    patch,
    settings,
    sizes_up_to,
    usd_per_million,
    why_none,
)


def measured(
    throughput: float,
    p99_s: float,
    cost: float | None = None,
    *,
    instances: int = 1,
    max_size: int = 8,
    precision: str = AS_EXPORTED,
) -> Measurement:
    setting = Setting(precision, instances, max_size, 2 * max_size)
    latency = {"p50": p99_s / 2, "p99": p99_s}
    return Measurement(setting, throughput, latency, 4.0, 1000, cost)


def test_every_size_is_tried_with_as_many_requests_as_fill_it_once_and_twice() -> None:
    tried = [(s.instances, s.max_size, s.concurrency) for s in settings("x", (1, 4), (1, 2))]
    assert tried == [
        (1, 1, 1), (1, 1, 2), (1, 4, 4), (1, 4, 8),
        (2, 1, 2), (2, 1, 4), (2, 4, 8), (2, 4, 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (10, (1, 2, 4, 8, 10))]
)
def test_sizes_are_powers_of_two_and_the_largest(largest: int, sizes: tuple[int, ...]) -> None:
    assert sizes_up_to(largest) == sizes


def test_a_million_rows_at_a_thousand_a_second_take_a_thousand_seconds() -> None:
    assert usd_per_million(3.6, 1000.0) == pytest.approx(1.0)
    assert usd_per_million(None, 1000.0) is None
    assert usd_per_million(3.6, 0.0) is None


def test_the_cheapest_that_keeps_the_latency_is_chosen() -> None:
    slow_and_cheap, fits, fast_and_dear = (
        measured(9000, 0.080, 1.0),
        measured(5000, 0.040, 2.0),
        measured(1000, 0.004, 9.0),
    )
    found = [fast_and_dear, slow_and_cheap, fits]
    assert choose(found, Objective("p99", 0.050)) is fits
    assert choose(found, Objective()) is slow_and_cheap
    assert choose(found, Objective("p50", 0.002)) is fast_and_dear
    assert choose(found, Objective("p99", 0.050, max_usd_per_million=1.5)) is None
    assert choose(found, Objective("p99", 0.001)) is None


def test_why_nothing_fits_is_told_with_the_closest_number() -> None:
    found = [measured(9000, 0.080, 1.0), measured(5000, 0.040, 2.0)]
    assert why_none(found, Objective("p99", 0.01)) == (
        "none of 2 settings is fast enough: the least p99 is 40 ms"
    )
    assert why_none(found, Objective("p99", 0.05, max_usd_per_million=1.5)) == (
        "of 2 settings 1 are fast enough; the cheapest of them costs 2 USD a million rows"
    )
    unpriced = [measured(9000, 0.080)]
    assert "has no price" in why_none(unpriced, Objective(max_usd_per_million=1.5))


def test_without_prices_the_fastest_is_chosen_and_no_limit_of_cost_is_met() -> None:
    found = [measured(1000, 0.01), measured(2000, 0.02)]
    assert choose(found, Objective()) is found[1]
    assert choose(found, Objective(max_usd_per_million=1e9)) is None


def test_of_two_that_cost_the_same_the_one_with_the_lower_latency_is_chosen() -> None:
    found = [measured(1000, 0.020, 1.00), measured(990, 0.010, 1.01), measured(900, 0.005, 1.1)]
    assert choose(found, Objective()) is found[1]


@given(
    st.lists(
        st.builds(
            measured,
            st.integers(1, 5).map(float),
            st.integers(1, 5).map(float),
            instances=st.integers(1, 3),
        ),
        min_size=1,
    )
)
def test_what_is_not_on_the_frontier_is_beaten_by_something_on_it(
    found: list[Measurement],
) -> None:
    best = frontier(found, "p99")
    for one in found:
        as_good = [
            m
            for m in best
            if m.throughput >= one.throughput
            and m.latency_s["p99"] <= one.latency_s["p99"]
            and m.setting.instances <= one.setting.instances
        ]
        assert as_good
        if one in best:
            assert all(
                (m.throughput, m.latency_s["p99"], m.setting.instances)
                == (one.throughput, one.latency_s["p99"], one.setting.instances)
                for m in as_good
            )


def test_the_patch_is_what_the_configuration_takes() -> None:
    one = measured(1, 1, instances=2, max_size=8, precision="bfloat16")
    assert patch("m", one, (4, 16)) == {
        "models": {
            "m": {
                "replicas": 2,
                "batching": {"max_size": 8, "buckets": [4, 8]},
                "torch": {"dtype": "bfloat16"},
            }
        }
    }
    assert patch("m", measured(1, 1), None) == {
        "models": {"m": {"replicas": 1, "batching": {"max_size": 8}}}
    }
