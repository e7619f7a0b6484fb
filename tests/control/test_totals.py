"""Sums over gateways, their restarts, and quantiles."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.control.totals import (
    BASE,
    MAX_INSTANCES,
    MAX_NAMES,
    SILENCE_S,
    Histogram,
    Totals,
)
from tests.control.world import gateway_report, model_row


def totals_of(totals: Totals) -> dict[tuple[str, str], dict[str, int]]:
    return {key: arm.requests for key, arm in totals.sum().items()}


def test_a_later_report_replaces_an_earlier_one_of_the_same_gateway() -> None:
    totals = Totals({})
    totals.report(gateway_report("g1", models=[model_row("1", 5)]), 0.0)
    totals.report(gateway_report("g1", models=[model_row("1", 8)]), 1.0)
    totals.report(gateway_report("g2", models=[model_row("1", 2), model_row("2", 1)]), 1.0)
    assert totals_of(totals) == {("m", "1"): {"success": 10}, ("m", "2"): {"success": 1}}


def test_a_restarted_gateway_adds_to_what_it_was() -> None:
    totals = Totals({})
    totals.report(gateway_report("g1", models=[model_row("1", 5)], started_at=1.0), 0.0)
    totals.report(gateway_report("g1", models=[model_row("1", 2)], started_at=9.0), 9.0)
    assert totals_of(totals) == {("m", "1"): {"success": 7}}


def test_gauges_are_those_of_the_living() -> None:
    totals = Totals({})
    row = model_row("1", 5, queue_depth=3, in_flight=2)
    totals.report(gateway_report("g1", models=[row]), 0.0)
    totals.report(gateway_report("g2", models=[row]), 10.0)
    arm = totals.sum(totals.live(10.0, 1.0))["m", "1"]
    assert (arm.total, arm.queue_depth, arm.in_flight) == (10, 3, 2)


def test_a_shielded_request_counts_once_and_is_no_error() -> None:
    totals = Totals({})
    for now, of in ((0.0, 0), (10.0, 1)):
        rows = [
            {**model_row("1", 0), "requests": {"success": 90 * of, "model_failed": 2 * of}},
            {**model_row("2", 0), "requests": {"success": 5 * of, "shielded": 3 * of}},
        ]
        totals.report(gateway_report("g1", models=rows), now)
        totals.note_rates(now)
    stable, canary = (totals.sum()["m", version] for version in ("1", "2"))
    assert (stable.total, stable.errors, stable.shielded) == (92, 2, 0)
    assert (canary.total, canary.errors, canary.shielded) == (5, 0, 3)
    # Stable answered the three: clients sent 97 requests, and two of them failed.
    assert totals.rate("m") == pytest.approx(9.7)


def test_only_changed_counts_are_written() -> None:
    totals = Totals({})
    totals.report(gateway_report("g1", models=[model_row("1", 5)]), 0.0)
    unsaved = totals.unsaved()
    assert len(unsaved) == 1
    totals.saved(unsaved)
    totals.report(gateway_report("g1", models=[model_row("1", 5, queue_depth=9)]), 1.0)
    assert totals.unsaved() == {}
    totals.report(gateway_report("g1", models=[model_row("1", 6)]), 2.0)
    assert list(totals.unsaved()) == ["g1@1.0"]


def test_the_dead_are_folded_without_losing_or_repeating_a_count() -> None:
    totals = Totals({})
    many = MAX_INSTANCES + 10
    for n in range(many):
        report = gateway_report(f"g{n}", models=[model_row("1", 1)], unrouted={"not_found": 1})
        totals.report(report, float(n))
    now = many + 1000.0
    past = totals.excess(now)
    assert len(past) == 10
    base = totals.folded(past)
    totals.fold(base, past)
    assert totals.excess(now) == []
    assert totals_of(totals) == {("m", "1"): {"success": many}}
    assert totals.unrouted() == {"not_found": many}
    totals.report(gateway_report("g0", models=[model_row("1", 1)]), now)
    assert totals_of(totals) == {("m", "1"): {"success": many}}, "a report that was late"
    stored = {BASE: json.loads(json.dumps(base)), **totals.unsaved()}
    assert totals_of(Totals(stored)) == {("m", "1"): {"success": many}}


def silent_ones(totals: Totals, count: int, now: float) -> None:
    for n in range(count):
        totals.report(gateway_report(f"silent-{n}", models=[model_row("1", 1)]), now)


def fold(totals: Totals, now: float) -> list[str]:
    past = totals.excess(now)
    totals.fold(json.loads(json.dumps(totals.folded(past))), past)
    return past


def test_who_has_not_had_the_time_to_report_is_not_folded() -> None:
    before = Totals({})
    silent_ones(before, MAX_INSTANCES + 1, 0.0)
    again = Totals(before.unsaved(), now=1000.0)
    assert again.excess(1000.0 + SILENCE_S) == [], "a controller that has just begun to listen"
    assert len(again.excess(1001.0 + SILENCE_S)) == 1


def test_the_longest_silent_are_folded_first() -> None:
    totals = Totals({})
    totals.report(gateway_report("living"), 0.0)
    silent_ones(totals, MAX_INSTANCES + 1, 0.0)
    totals.report(gateway_report("living"), 400.0)
    totals.report(gateway_report("silent-0"), 50.0)
    assert fold(totals, 500.0) == ["silent-1@1.0"]


def counted(requests: int, failed: int) -> dict[str, Any]:
    trial = {"rollout": "m:1", "epoch": 1, "arm": "canary", "replica": "r"}
    trial |= {"requests": requests, "failed": failed, "latency": {"3": requests - failed}}
    split = {"rollout": "m:1", "breaker": "closed", "opened": failed}
    return {"trials": [trial], "shadows": [], "splits": [split]}


def test_a_gateway_that_was_taken_for_gone_is_heard_again_and_repeats_nothing() -> None:
    totals = Totals({})
    totals.trials.live = {"m:1"}

    def report(success: int, failed: int, now: float) -> None:
        rows = [model_row("1", success, in_flight=2)]
        rollouts = counted(success, failed)
        totals.report(gateway_report("g", 5, rows, rollouts=rollouts), now)

    report(10, 1, 0.0)
    silent_ones(totals, MAX_INSTANCES, 1.0)
    assert fold(totals, 400.0) == ["g@1.0"]
    report(12, 1, 401.0)
    assert totals.live(401.0, 1.0) == ["g@1.0"]
    assert totals.sum()["m", "1"].requests == {"success": 12 + MAX_INSTANCES}
    report(15, 4, 402.0)

    def check(totals: Totals) -> None:
        total = totals.sum()["m", "1"]
        assert total.requests == {"success": 15 + MAX_INSTANCES}
        assert total.histograms["latency"].count == 15 + MAX_INSTANCES
        row = totals.trials.counts("m:1")[1].canary["r"]
        assert (row.requests, row.failed, row.latency.total) == (15, 4, 11)
        assert totals.trials.breakers("m:1", ()).opened == 4

    check(totals)
    assert totals.sum(["g@1.0"])["m", "1"].in_flight == 2
    unsaved = totals.unsaved()
    totals.saved(unsaved)
    assert totals.unsaved() == {}
    totals = Totals(json.loads(json.dumps(unsaved)), 500.0)
    totals.trials.live = {"m:1"}
    check(totals)
    report(15, 4, 501.0)
    check(totals)
    totals.fold(totals.folded(["g@1.0"]), ["g@1.0"])
    check(totals)


def test_an_epoch_that_a_gateway_tells_no_more_stays_counted() -> None:
    totals = Totals({})
    totals.trials.live = {"m:1"}
    first = counted(10, 1)
    second = {**first, "trials": [{**first["trials"][0], "epoch": 2}]}
    both = {**first, "trials": first["trials"] + second["trials"]}
    for rollouts in (first, both, second):
        totals.report(gateway_report("g", rollouts=rollouts), 0.0)
    totals = Totals(json.loads(json.dumps(totals.unsaved())))
    totals.trials.live = {"m:1"}
    totals.report(gateway_report("g", rollouts=second), 1.0)
    counts = totals.trials.counts("m:1")
    assert [counts[epoch].canary["r"].requests for epoch in (1, 2)] == [10, 10]


def test_what_fails_late_is_counted_although_it_began_before_its_gateway_was_taken_for_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    totals = Totals({})
    totals.trials.live = {"m:1"}

    def report(failed: int, now: float) -> None:
        rows = [model_row("1", 10 - failed, requests={"success": 10 - failed, "timeout": failed})]
        totals.report(gateway_report("g", 5, rows, rollouts=counted(10, failed)), now)

    report(1, 0.0)
    silent_ones(totals, MAX_INSTANCES, 1.0)
    past = totals.excess(400.0)
    base = json.loads(json.dumps(totals.folded(past)))
    totals.fold(base, past)
    report(3, 401.0)

    def check(totals: Totals) -> None:
        row = totals.trials.counts("m:1")[1].canary["r"]
        assert (row.requests, row.failed) == (10, 3)
        assert totals.sum()["m", "1"].requests["timeout"] == 3

    check(totals)
    totals = Totals({BASE: base, **json.loads(json.dumps(totals.unsaved()))}, 500.0)
    totals.trials.live = {"m:1"}
    check(totals)
    totals.fold(totals.folded(["g@1.0"]), ["g@1.0"])
    check(totals)
    report(3, 600.0)
    check(totals)
    assert caplog.text == ""


def test_of_one_that_was_folded_long_ago_what_is_lost_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    totals = Totals({})
    totals.report(gateway_report("g", models=[model_row("1", 10)]), 0.0)
    for now in (1.0, 1000.0, 2000.0):
        for n in range(MAX_INSTANCES):
            report = gateway_report(f"{now}-{n}", models=[model_row("1", 1)])
            totals.report(report, now)
        fold(totals, now + 400.0)
    before = totals_of(totals)["m", "1"]["success"]
    totals.report(gateway_report("g", models=[model_row("1", 13)]), 3000.0)
    assert totals_of(totals)["m", "1"]["success"] == before
    assert "gateway g@1.0 was taken for gone: what it counted until now" in caplog.text
    totals.report(gateway_report("g", models=[model_row("1", 15)]), 3001.0)
    assert totals_of(totals)["m", "1"]["success"] == before + 2


def test_one_that_was_folded_before_all_that_have_names_repeats_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    totals = Totals({})
    totals.report(gateway_report("g", models=[model_row("1", 10)], started_at=1.0), 0.0)
    for n in range(MAX_NAMES + MAX_INSTANCES + 1):
        totals.report(gateway_report(f"{n}", models=[model_row("1", 1)], started_at=2.0 + n), 1.0)
    past = totals.excess(400.0)
    totals.fold(json.loads(json.dumps(totals.folded(past))), past)
    before = totals_of(totals)["m", "1"]["success"]
    totals.report(gateway_report("g", models=[model_row("1", 13)], started_at=1.0), 401.0)
    assert totals_of(totals)["m", "1"]["success"] == before, "ten of them were counted"
    assert "gateway g@1.0 was taken for gone" in caplog.text
    totals.report(gateway_report("g", models=[model_row("1", 15)], started_at=1.0), 402.0)
    totals.report(gateway_report("new", models=[model_row("1", 7)], started_at=9999.0), 402.0)
    assert totals_of(totals)["m", "1"]["success"] == before + 2 + 7


def test_one_that_is_heard_again_while_others_are_folded_lives() -> None:
    totals = Totals({})
    totals.report(gateway_report("g", models=[model_row("1", 10)]), 0.0)
    for now in (1.0, 1000.0):
        for n in range(MAX_INSTANCES):
            totals.report(gateway_report(f"{now}-{n}", models=[model_row("1", 1)]), now)
        fold(totals, now + 400.0)
    totals.report(gateway_report("another", models=[]), 1001.0)
    past = totals.excess(1500.0)
    base = totals.folded(past)
    # It takes the store a moment to save the base.
    totals.report(gateway_report("g", models=[model_row("1", 13)]), 1500.0)
    totals.fold(base, past)
    before = totals_of(totals)["m", "1"]["success"]
    totals.report(gateway_report("g", models=[model_row("1", 15)]), 1501.0)
    assert totals_of(totals)["m", "1"]["success"] == before + 2


def test_answers_that_gateways_forgot_are_added_up() -> None:
    totals = Totals({})
    totals.trials.live = {"m:1"}

    def report(forgotten: int, now: float) -> None:
        split = {"rollout": "m:1", "breaker": "closed", "opened": 0, "forgotten": forgotten}
        totals.report(gateway_report("g", rollouts={"splits": [split]}), now)

    report(3, 0.0)
    assert totals.trials.forgotten("m:1") == 3
    silent_ones(totals, MAX_INSTANCES, 1.0)
    fold(totals, 400.0)
    report(5, 401.0)
    assert totals.trials.forgotten("m:1") == 5


def test_a_late_report_that_cannot_be_compared_raises_and_counts_nothing() -> None:
    totals = Totals({})
    totals.report(gateway_report("g", models=[model_row("1", 10)]), 0.0)
    silent_ones(totals, MAX_INSTANCES, 1.0)
    fold(totals, 400.0)
    other = model_row("1", 11)
    bounds = {"seconds": [0.001], "rows": [1]}
    for name in ("latency", "gateway", "queue", "compute", "batch_size"):
        other[name] = {"counts": [11, 0], "sum": 1.0}
    with pytest.raises(ValueError, match="zip"):
        totals.report(gateway_report("g", models=[other], bounds=bounds), 401.0)
    assert totals_of(totals) == {("m", "1"): {"success": 10 + MAX_INSTANCES}}


def test_a_malformed_row_of_a_gateway_that_is_gone_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    totals = Totals({})
    totals.trials.live = {"m:1"}
    rows = counted(5, 1)
    rows["trials"] += [{**rows["trials"][0], "failed": 9}, {"rollout": "m:1"}]
    rows["splits"] += [{"rollout": "m:1", "breaker": "ajar"}, {"opened": 9}]
    totals.report(gateway_report("g", rollouts=rows), 0.0)
    assert "9 failed requests of 5" in caplog.text
    silent_ones(totals, MAX_INSTANCES, 1.0)
    assert fold(totals, 400.0) == ["g@1.0"]
    assert {r: c.requests for r, c in totals.trials.counts("m:1")[1].canary.items()} == {"r": 5}
    assert totals.trials.breakers("m:1", ()).opened == 1
    assert totals.trials.totals("m:1")["shielded"] == 0


def test_a_malformed_report_raises_and_counts_nothing() -> None:
    totals = Totals({})
    broken = gateway_report("g1", models=[{**model_row("1", 1), "latency": None}])
    with pytest.raises(TypeError):
        totals.report(broken, 0.0)
    assert totals.sum() == {}


def test_quantiles_interpolate_inside_a_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 4.0), [0, 10, 10, 0], 0.0)
    assert histogram.quantile(0.5) == 2.0
    assert histogram.quantile(0.25) == 1.5
    assert histogram.quantile(0.75) == 3.0
    assert Histogram.empty((1.0,)).quantile(0.5) is None
    assert Histogram((1.0,), [0, 3], 0.0).quantile(0.99) == 1.0, "beyond the last bound"


COUNTS = st.lists(st.integers(0, 50), min_size=5, max_size=5)


@given(COUNTS, COUNTS)
def test_other_bounds_lose_no_observation_and_claim_no_smaller_value(
    counts: list[int], others: list[int]
) -> None:
    ours = Histogram((1.0, 2.0, 4.0, 8.0), list(counts), 1.0)
    ours.add((0.5, 2.0, 3.0, 9.0), others, 2.0)
    assert ours.count == sum(counts) + sum(others)
    assert ours.sum == 3.0
    for i, bound in enumerate(ours.bounds):
        at_most = sum(n for b, n in zip((0.5, 2.0, 3.0, 9.0), others, strict=False) if b <= bound)
        assert sum(ours.counts[: i + 1]) == sum(counts[: i + 1]) + at_most
