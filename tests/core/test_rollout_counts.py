from __future__ import annotations

import json
from math import isnan
from typing import Any

import numpy as np
import pytest

from serving.core.rollout_counts import (
    LATENCY_BOUNDS,
    OVERFLOW,
    ArmCountsRow,
    Breakers,
    EpochCounts,
    Histogram,
    Sample,
    add_up,
    read_row,
    recent,
)


def row(**changes: Any) -> dict[str, Any]:
    return {
        "rollout": "r1",
        "epoch": 2,
        "arm": "canary",
        "replica": "a",
        "requests": 10,
        "failed": 2,
        "batches": 4,
        "failed_batches": 1,
        "latency": {"5": 6, "9": 2},
        "batch_latency": {"9": 3},
        "predictions": {"7": 8},
        "labels": {"n": 3, "k": 1},
        "shielded": 2,
        **changes,
    }


def test_bounds_go_from_50_microseconds_past_a_minute_in_steps_of_seven_percent() -> None:
    assert LATENCY_BOUNDS[0] == 50e-6
    assert LATENCY_BOUNDS[-2] < 60 <= LATENCY_BOUNDS[-1]
    ratios = np.diff(np.log(LATENCY_BOUNDS))
    assert np.allclose(ratios, np.log(1.07))


def test_rows_of_gateways_and_replicas_add_up_in_any_order() -> None:
    rows = [
        row(),
        row(requests=5, failed=0, failed_batches=0, latency={"9": 5}),
        row(replica="b", requests=1, failed=1),
        row(arm="stable", replica="s"),
        row(epoch=3),
        row(rollout="r2"),
        {"rollout": "r1", "epoch": 2, "pairs": 7, "disagreements": 1, "dropped": 2},
        {"rollout": "r1", "epoch": 2, "pairs": 3, "disagreements": 0, "dropped": 0},
    ]
    total = add_up(rows)
    assert add_up(reversed(rows)) == total
    assert set(total) == {"r1", "r2"}
    assert set(total["r1"]) == {2, 3}

    counts = total["r1"][2]
    assert set(counts.canary) == {"a", "b"}
    assert counts.canary["a"].requests == 15
    assert counts.canary["a"].latency == Histogram({5: 6, 9: 7})
    assert (counts.pairs, counts.disagreements, counts.dropped) == (10, 1, 2)
    assert counts.arm("canary").failures == (16, 3, 12, 2)
    assert counts.arm("canary").labels == (9, 3)
    assert counts.arm("stable").requests == 10


def test_counts_survive_json() -> None:
    counts = add_up([row(), row(arm="stable", replica="s")])["r1"][2]
    assert EpochCounts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts


def test_what_a_row_does_not_say_counts_zero() -> None:
    bare = {"rollout": "r1", "epoch": 0, "arm": "stable", "replica": "s"}
    assert read_row(bare) == ("r1", 0, EpochCounts(stable={"s": ArmCountsRow()}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": ""}, "rollout is a name, not ''"),
        ({"epoch": "2"}, "epoch is an integer of at least 0, not '2'"),
        ({"arm": "blue"}, "arm is stable or canary, not 'blue'"),
        ({"replica": None}, "replica is a name, not None"),
        ({"requests": -1}, "requests is an integer of at least 0, not -1"),
        ({"requests": 1.5}, "requests is an integer of at least 0, not 1.5"),
        ({"requests": True}, "requests is an integer of at least 0, not True"),
        ({"failed": 11}, "11 failed requests of 10: more than there are"),
        ({"failed_batches": 5}, "5 failed batches of 4: more than there are"),
        ({"labels": {"n": 1, "k": 2}}, "2 wrong labels of 1: more than there are"),
        ({"labels": [1, 2]}, "labels is an object"),
        ({"latency": {"-1": 1}}, "a latency bucket is a number from 0 to 208, not '-1'"),
        ({"latency": {"209": 1}}, "a latency bucket is a number from 0 to 208, not '209'"),
        ({"latency": {"5": "x"}}, "latency['5'] is an integer of at least 0, not 'x'"),
        ({"predictions": {"cat": None}}, "predictions['cat'] is an integer of at least 0"),
    ],
)
def test_a_malformed_row_is_refused_with_what_is_wrong(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        read_row(row(**changes))
    assert message in str(caught.value)
    assert str(caught.value).startswith("counts of rollout")


@pytest.mark.parametrize("raw", [None, [1], "row"])
def test_a_row_is_an_object(raw: Any) -> None:
    with pytest.raises(ValueError, match="a row is an object"):
        read_row(raw)


def test_more_disagreements_than_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="3 disagreements of 2"):
        read_row({"rollout": "r1", "epoch": 0, "pairs": 2, "disagreements": 3})


def test_slower_counts_what_lies_past_a_bound() -> None:
    histogram = Histogram({3: 5, 4: 2, OVERFLOW: 1})
    assert histogram.slower(3) == 3
    assert histogram.slower(4) == 1
    assert histogram.slower(len(LATENCY_BOUNDS) - 1) == 1


@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_is_as_near_as_a_bucket_is_wide(q: float) -> None:
    latencies = np.random.default_rng(1).lognormal(-5, 0.7, 5000)
    buckets = np.searchsorted(LATENCY_BOUNDS, latencies)
    histogram = Histogram(dict(enumerate(np.bincount(buckets).tolist())))
    assert histogram.quantile(q) == pytest.approx(np.quantile(latencies, q), rel=0.07)


def test_a_quantile_of_nothing_is_no_number_and_past_all_bounds_the_last() -> None:
    assert isnan(Histogram().quantile(0.5))
    assert Histogram({OVERFLOW: 3}).quantile(0.5) == LATENCY_BOUNDS[-1]


def test_predictions_of_one_request_are_one_batch() -> None:
    counts = ArmCountsRow(requests=12, failed=2, predictions={"cat": 80, "dog": 15, "eel": 5})
    assert counts.predicted({"cat"}) == (100, 80, 10, 8)
    assert counts.predicted({"cat", "dog"}, other=True) == (100, 5, 10, 0)
    assert ArmCountsRow().predicted({"cat"}) == (0, 0, 0, 0)


def sample(at: float, failed: int) -> Sample:
    return Sample(at, stable=(1000, 0, 100, 0), canary=(100 * failed, failed, failed, failed))


def test_the_last_seconds_are_the_difference_of_samples() -> None:
    history = [sample(float(at), at) for at in range(11)]
    latest = recent(history, 3)
    assert (latest.at, latest.canary, latest.stable) == (10.0, (300, 3, 3, 3), (0, 0, 0, 0))
    # History that does not reach back: all since it began.
    assert recent(history, 60).canary == (1000, 10, 10, 10)
    assert recent((), 60).canary == (0, 0, 0, 0)
    assert recent(history[:1], 60).canary == (0, 0, 0, 0)


def test_a_sample_sums_up_epochs_and_replicas() -> None:
    counts = add_up([row(), row(replica="b"), row(epoch=3), row(arm="stable")])["r1"]
    assert Sample.of(7.0, counts) == Sample(7.0, stable=(10, 2, 4, 1), canary=(30, 6, 12, 3))


def test_breakers_of_all_gateways() -> None:
    rows = [{"breaker": "open", "opened": 2}, {"breaker": "closed", "opened": 1}]
    assert Breakers.of_rows(rows) == Breakers(open=1, opened=3)
    with pytest.raises(ValueError, match="breaker is closed or open, not 'ajar'"):
        Breakers.of_rows([{"breaker": "ajar"}])


def test_first_failures_of_users_out_of_all_their_requests() -> None:
    """A minute without new users may have many that fail for the first time."""
    many = Histogram({60: 5000})
    users = ArmCountsRow(50, 20, 10, 5, latency=many, batch_latency=Histogram({60: 800}))
    assert users.failures == (50, 20, 10, 5)
    assert users.attempts == (5020, 20, 800, 5)
    requests = ArmCountsRow(5020, 20, 800, 5, latency=many, batch_latency=Histogram({60: 799}))
    assert requests.attempts == requests.failures
    assert Sample.of(0.0, {1: EpochCounts(canary={"a": users})}).canary == users.attempts
