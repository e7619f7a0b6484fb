from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any, cast

import numpy as np
import pytest

from serving.core import triggers
from serving.core.clusters import correlation, design_effect
from serving.core.evidence import log_threshold
from serving.core.one_arm import LARGE, STEPS, spent
from serving.core.rollout_baseline import (
    drift_bins,
    latency_bounds,
    moved_bounds,
    stable_so_far,
)
from serving.core.rollout_counts import (
    LATENCY_BOUNDS,
    NOTHING,
    ArmCountsRow,
    Breakers,
    EpochCounts,
    Histogram,
    Sample,
)
from serving.core.rollout_spec import (
    TRIGGER_KINDS,
    Analysis,
    Assignment,
    Compare,
    Feedback,
    RolloutSpec,
    Shadow,
    Step,
    default_plan,
    default_trigger,
)
from serving.core.rollout_types import Epoch, Outcome, ProviderState, Rollout, Snapshot, Verdict
from serving.core.triggers import KINDS, evaluate
from tests.core import rollout_traffic
from tests.core.rollout_traffic import PLAN, Events, detections, log_e, seconds, sticky

# What the comparison of both arms must reach: it has the larger part of a trigger's budget.
ERRORS = log_threshold(0.3 * STEPS, 0.01)
LATENCY = log_threshold(0.25 * STEPS, 0.01)


# The whole of a trigger, from counts to its verdict.


def rollout(*epochs: Epoch, kinds: tuple[str, ...] = ("errors",), **changes: Any) -> Rollout:
    found = tuple(default_trigger(kind) for kind in TRIGGER_KINDS if kind in kinds)
    spec = RolloutSpec(
        steps=tuple(Step(weight=w, hold_s=60) for w in (1, 5, 25, 50)),
        analysis=Analysis(triggers=found),
    )
    return Rollout(
        **{
            "id": "r1",
            "model": "digits",
            "stable": "1",
            "canary": "2",
            "stable_digest": "a",
            "canary_digest": "b",
            "spec": spec,
            "salt": "salt",
            "created_at": 0.0,
            "changed_at": 0.0,
            "entered_at": 0.0,
            "step_entered_at": 0.0,
            "epochs": epochs or (Epoch(1, 0, 0.05),),
            **changes,
        }
    )


def snapshot(counts: Mapping[int, EpochCounts] | None = None, **changes: Any) -> Snapshot:
    return Snapshot(
        **{
            "now": 1000.0,
            "canary_ready": 1,
            "canary_wanted": 1,
            "stable_ready": 1,
            "revision": 1,
            "gateways_at": 1,
            "counts": counts or {},
            **changes,
        }
    )


def failures(n: int, k: int) -> ArmCountsRow:
    """Requests in batches of their own."""
    return ArmCountsRow(requests=n, failed=k, batches=n, failed_batches=k)


def epoch(canary: ArmCountsRow, stable: ArmCountsRow) -> EpochCounts:
    return EpochCounts(stable={"s": stable}, canary={"c": canary})


def only(verdicts: tuple[Verdict, ...]) -> Verdict:
    (verdict,) = verdicts
    return verdict


def judged(counts: EpochCounts, kind: str = "errors", **changes: Any) -> Verdict:
    return only(evaluate(rollout(kinds=(kind,), **changes), snapshot({1: counts})))


def test_a_verdict_for_every_trigger_in_the_order_of_the_plan() -> None:
    plan = default_plan("canary")
    started = replace(rollout(), spec=plan)
    verdicts = evaluate(started, snapshot())
    assert [v.trigger for v in verdicts] == [t.name for t in plan.analysis.triggers]
    assert not any(v.verdict in (Outcome.FAIL, Outcome.UNKNOWN) for v in verdicts)
    # None of those that bet pass without data: nothing is not success.
    bets = {t.name for t in plan.analysis.triggers if t.weight}
    assert {v.verdict for v in verdicts if v.trigger in bets} == {Outcome.HOLD}


def test_every_kind_of_a_plan_has_its_judge() -> None:
    assert set(triggers.KINDS) == set(TRIGGER_KINDS)


def test_errors_fail_with_the_numbers_in_a_sentence() -> None:
    verdict = judged(epoch(failures(240, 12), failures(4560, 9)))
    assert verdict.verdict is Outcome.FAIL
    assert verdict.action == "rollback"
    assert (verdict.canary, verdict.baseline) == ((240, 12), (4560, 9))
    assert verdict.threshold == pytest.approx(log(1 / (0.3 * 0.01)))
    assert verdict.log_e is not None
    assert verdict.log_e > verdict.threshold
    assert verdict.sentence == (
        "errors: canary failed 12 of 240 requests (5.0 %), stable 9 of 4560 (0.2 %); "
        f"evidence 10^{verdict.log_e / log(10):.1f}, threshold 10^2.5: fails"
    )


def test_users_that_fail_after_many_requests_fail_the_version() -> None:
    many = Histogram({60: 50_000})
    users = replace(failures(50, 25), latency=many, batch_latency=many)
    found = judged(epoch(users, failures(150, 0)))
    assert found.verdict is Outcome.FAIL


def test_where_users_stick_to_their_version_sentences_count_users() -> None:
    by_user = replace(rollout().spec, assignment=Assignment("header:x-user"))
    few = judged(epoch(failures(49, 49), failures(1000, 0)), spec=by_user)
    assert "canary failed 49 of 49 users (100.0 %), stable 0 of 1000" in few.sentence
    assert "waits for 50 users of the canary" in few.sentence
    bake = ArmCountsRow(20, 2, 20, 2, Histogram({60: 898}), Histogram({60: 898}))
    seen = snapshot({1: epoch(failures(60, 0), failures(900, 0)), 2: EpochCounts({}, {"c": bake})})
    trial = rollout(Epoch(1, 0, 0.5), Epoch(2, 4, 1.0), spec=by_user)
    assert "in the bake failed 2 users in 900 requests" in only(evaluate(trial, seen)).sentence


def test_in_the_bake_users_are_not_held_against_users_of_a_shorter_time() -> None:
    """One request in 500 fails; a user makes 10 in the step and 100 in the bake."""
    step = ArmCountsRow(5000, 100, 5000, 100, Histogram({60: 49_900}), Histogram({60: 49_900}))
    bake = ArmCountsRow(5000, 900, 5000, 900, Histogram({60: 499_100}), Histogram({60: 499_100}))
    trial = rollout(Epoch(1, 0, 0.5), Epoch(2, 4, 1.0))
    seen = snapshot({1: EpochCounts({"s": step}, {"c": step}), 2: EpochCounts({}, {"c": bake})})
    assert only(evaluate(trial, seen)).verdict is not Outcome.FAIL


def test_few_units_or_events_hold_whatever_the_evidence() -> None:
    few = judged(epoch(failures(49, 49), failures(1000, 0)))
    assert few.verdict is Outcome.HOLD
    assert "waits for 50 requests of the canary" in few.sentence
    assert judged(epoch(failures(50, 50), failures(1000, 0))).verdict is Outcome.FAIL

    twice = ArmCountsRow(requests=64, failed=64, batches=2, failed_batches=2)
    one_batch = judged(epoch(twice, failures(1200, 0)))
    assert one_batch.verdict is Outcome.HOLD


def test_as_good_as_stable_passes_and_a_little_data_does_neither() -> None:
    passing = judged(epoch(failures(15_000, 15), failures(45_000, 45)), epochs=(Epoch(1, 2, 0.25),))
    assert passing.verdict is Outcome.PASS
    assert "no worse" in passing.sentence
    undecided = judged(epoch(failures(100, 0), failures(1900, 2)))
    assert undecided.verdict is Outcome.HOLD
    assert undecided.sentence.endswith("not decided")


def test_an_epoch_with_one_arm_closed_is_no_evidence() -> None:
    # Without stable in the midst of a step, where the bake's test does not belong.
    epochs = (Epoch(1, -1, 0.0), Epoch(2, 1, 1.0))
    counts = {
        1: epoch(failures(500, 500), failures(500, 0)),
        2: epoch(failures(500, 500), failures(0, 0)),
    }
    verdict = only(evaluate(rollout(*epochs), snapshot(counts)))
    assert (verdict.verdict, verdict.log_e) == (Outcome.HOLD, spent(0.0))
    assert verdict.canary == (0, 0)


def test_pooling_over_a_ramp_would_mislead_where_epochs_do_not() -> None:
    # Stable had a bad hour while the canary was small, and a good one since: the same rates at
    # either time, but the canary's requests are mostly of the good hour, or here of the bad one.
    epochs = (Epoch(1, 0, 0.01), Epoch(2, 3, 0.5))
    counts = {
        1: epoch(failures(100, 0), failures(9900, 10)),
        2: epoch(failures(5000, 250), failures(5000, 250)),
    }
    assert only(evaluate(rollout(*epochs), snapshot(counts))).verdict is not Outcome.FAIL
    pooled = {1: epoch(failures(5100, 250), failures(14_900, 260))}
    assert only(evaluate(rollout(Epoch(1, 0, 0.25)), snapshot(pooled))).verdict is Outcome.FAIL


def test_one_bad_replica_of_two_is_not_the_versions_fault() -> None:
    stable = {"s": failures(9000, 9)}
    one = EpochCounts(stable, {"a": failures(500, 50), "b": failures(500, 0)})
    verdict = judged(one)
    assert verdict.verdict is Outcome.HOLD
    assert "it all comes from replica a (10^" in verdict.sentence
    both = EpochCounts(stable, {"a": failures(500, 50), "b": failures(500, 40)})
    assert judged(both).verdict is Outcome.FAIL
    # One that has hardly begun, or died young, is no witness for the other.
    young = EpochCounts(stable, {"a": failures(1000, 100), "b": failures(10, 0)})
    assert judged(young).verdict is Outcome.FAIL


def test_failed_batches_are_what_they_are_worth() -> None:
    stable = ArmCountsRow(requests=19_000, failed=64, batches=600, failed_batches=60)
    in_batches = ArmCountsRow(requests=1000, failed=32, batches=125, failed_batches=4)
    each_alone = replace(in_batches, failed_batches=32)
    assert judged(epoch(each_alone, stable)).verdict is Outcome.FAIL
    assert judged(epoch(in_batches, stable)).verdict is Outcome.HOLD


def histogram(*seconds: float) -> Histogram:
    buckets = np.bincount(np.searchsorted(LATENCY_BOUNDS, seconds)).tolist()
    return Histogram({bucket: count for bucket, count in enumerate(buckets) if count})


def answers(latencies: list[float]) -> ArmCountsRow:
    counted = histogram(*latencies)
    n = len(latencies)
    return ArmCountsRow(requests=n, batches=n, latency=counted, batch_latency=counted)


def some_latencies(count: int, median_s: float, seed: int = 1) -> list[float]:
    spread = np.random.default_rng(seed).lognormal(0, 0.15, count)
    return (median_s * spread).tolist()


def test_a_version_half_as_slow_again_fails_though_its_tail_is_in_bounds() -> None:
    stable = answers(some_latencies(9500, 0.010))
    bounds = latency_bounds(stable)
    assert bounds is not None
    at = Epoch(1, 0, 0.05, latency_bounds=bounds)
    slow = answers(some_latencies(500, 0.015, seed=2))
    trial = rollout(at, kinds=("latency",))
    verdict = only(evaluate(trial, snapshot({1: epoch(slow, stable)})))
    assert verdict.verdict is Outcome.FAIL
    assert re.search(r"longer than 1\d(\.\d)? ms took \d+ of 500 canary answers", verdict.sentence)

    healthy = answers(some_latencies(500, 0.010, seed=2))
    later = only(evaluate(trial, snapshot({1: epoch(healthy, stable)})))
    assert later.verdict is not Outcome.FAIL


def test_users_who_stick_may_crowd_the_canary_without_making_it_slow() -> None:
    # At a weight of 5 % the canary has 30 % of the requests, and so of the slow ones.
    stable = answers(some_latencies(7000, 0.010))
    canary = answers(some_latencies(3000, 0.010, seed=2))
    bounds = latency_bounds(answers(some_latencies(7000, 0.008)))
    at = Epoch(1, 0, 0.05, latency_bounds=bounds)
    verdict = only(evaluate(rollout(at, kinds=("latency",)), snapshot({1: epoch(canary, stable)})))
    assert verdict.verdict is not Outcome.FAIL


def test_a_canary_that_nobody_waits_for_is_slow() -> None:
    """All of its clients gave up, so there is no other count of it."""
    stable = answers(some_latencies(7000, 0.008))
    late = answers([1.0] * 200)
    hangs = ArmCountsRow(latency=late.latency, batch_latency=late.batch_latency, given_up=200)
    at = Epoch(1, 0, 0.05, latency_bounds=latency_bounds(stable))
    seen = snapshot({1: epoch(hangs, stable)})
    assert only(evaluate(rollout(at, kinds=("latency",)), seen)).verdict is Outcome.FAIL


def test_latency_waits_for_bounds() -> None:
    verdict = judged(epoch(failures(100, 0), failures(100, 0)), "latency")
    assert verdict.verdict is Outcome.HOLD
    assert "waits for 400 answers of stable to judge by, 0 so far" in verdict.sentence
    verdict = judged(epoch(failures(100, 0), answers([0.01] * 900)), "latency")
    assert verdict.sentence == (
        "latency: judged from the first step on, which sets its bounds: holds"
    )


def test_latency_says_that_a_stable_is_too_slow_to_judge_by() -> None:
    verdict = judged(epoch(failures(100, 0), answers([35.0] * 900)), "latency")
    assert verdict.verdict is Outcome.HOLD
    assert verdict.sentence == (
        "latency: stable is too slow to judge by, its 99th percentile is 35.2 s: a bound would lie "
        "beyond 60 s, where latencies are no longer told apart: holds"
    )


@pytest.mark.parametrize(
    ("pairs", "disagreements", "outcome"),
    [(100, 9, "hold"), (200, 30, "fail"), (2000, 5, "pass"), (0, 0, "hold"), (40, 40, "hold")],
)
def test_disagreement_is_judged_by_a_bound(pairs: int, disagreements: int, outcome: str) -> None:
    verdict = judged(EpochCounts(pairs=pairs, disagreements=disagreements), "disagreement")
    assert verdict.verdict.value == outcome
    assert verdict.canary == (pairs, disagreements)


@pytest.mark.parametrize(("failed", "outcome"), [(0, "hold"), (400, "fail")])
def test_copies_that_are_not_compared_fail_a_version_and_never_pass_it(
    failed: int, outcome: str
) -> None:
    trial = rollout(kinds=("disagreement",))
    copying = replace(trial.spec, shadow=Shadow(compare=Compare("none")))
    counts = EpochCounts(pairs=2000, disagreements=failed)
    verdict = only(evaluate(replace(trial, spec=copying), snapshot({1: counts})))
    assert verdict.verdict.value == outcome
    assert f"canary failed {failed} of 2000 copies" in verdict.sentence
    assert "their answers are not compared" in verdict.sentence
    assert "disagreed" not in verdict.sentence


def predictions(**counts: int) -> ArmCountsRow:
    n = sum(counts.values())
    return ArmCountsRow(requests=n, batches=n, predictions=counts)


def test_drift_finds_the_bin_that_grew_and_leaves_small_changes_alone() -> None:
    stable = predictions(cat=9000, dog=900, eel=100)
    at = Epoch(1, 0, 0.5, drift_bins=drift_bins(stable))
    trial = rollout(at, kinds=("drift",))
    shifted = only(
        evaluate(trial, snapshot({1: epoch(predictions(cat=8000, dog=1900, eel=100), stable)}))
    )
    assert (shifted.verdict, shifted.action) == (Outcome.FAIL, "pause")
    assert "predicted dog in 1900 of 10000" in shifted.sentence
    new = only(evaluate(trial, snapshot({1: epoch(predictions(cat=9000, newt=1000), stable)})))
    assert new.verdict is Outcome.FAIL
    assert "predicted any other" in new.sentence
    same = only(
        evaluate(trial, snapshot({1: epoch(predictions(cat=8950, dog=940, eel=110), stable)}))
    )
    assert same.verdict is not Outcome.FAIL


def test_ten_rows_of_one_request_are_not_ten_predictions() -> None:
    stable = predictions(cat=9000, dog=1000)
    at = Epoch(1, 0, 0.5, drift_bins=("cat", "dog"))
    each = predictions(cat=800, dog=200)
    few_requests = replace(each, requests=10)
    trial = rollout(at, kinds=("drift",))
    alone, together = (
        only(evaluate(trial, snapshot({1: epoch(row, stable)}))) for row in (each, few_requests)
    )
    assert alone.log_e is not None
    assert together.log_e is not None
    assert together.log_e < alone.log_e


def test_labels_take_a_version_back_whose_answers_are_wrong() -> None:
    wrong = epoch(ArmCountsRow(labels=(200, 60)), ArmCountsRow(labels=(3800, 200)))
    assert judged(wrong, "labels").verdict is Outcome.FAIL
    well = epoch(ArmCountsRow(labels=(200, 11)), ArmCountsRow(labels=(3800, 200)))
    assert judged(well, "labels").verdict is not Outcome.FAIL


@pytest.mark.parametrize(
    ("restarts", "outcome"),
    [((), "pass"), ((990.0,), "pass"), ((600.0, 990.0), "pass"), ((800.0, 990.0), "fail")],
)
def test_two_restarts_in_five_minutes_are_a_crash_loop(
    restarts: tuple[float, ...], outcome: str
) -> None:
    kept = rollout(kinds=("crash_loop",), restarts=restarts)
    assert only(evaluate(kept, snapshot())).verdict.value == outcome
    # The same restart, seen in the tick and remembered from it, is one.
    seen = snapshot(restarts=restarts)
    assert only(evaluate(kept, seen)).verdict.value == outcome


def outage(canary: tuple[int, int], stable: tuple[int, int]) -> tuple[Sample, ...]:
    """A minute of 2 % errors in both arms, then a second with these (requests, failed)."""

    def tally(n: int, k: int) -> tuple[int, int, int, int]:
        return n, k, n, k

    samples = [Sample(float(t), tally(950 * t, 19 * t), tally(50 * t, t)) for t in range(61)]
    last = samples[-1]
    return (
        *samples,
        Sample(
            61.0,
            tally(last.stable[0] + stable[0], last.stable[1] + stable[1]),
            tally(last.canary[0] + canary[0], last.canary[1] + canary[1]),
        ),
    )


@pytest.mark.parametrize(
    ("canary", "stable", "outcome"),
    [((10, 8), (950, 19), "fail"), ((10, 8), (950, 760), "hold"), ((0, 0), (950, 19), "hold")],
)
def test_an_open_breaker_is_the_versions_fault_unless_stable_fails_likewise(
    canary: tuple[int, int], stable: tuple[int, int], outcome: str
) -> None:
    trial = rollout(kinds=("breaker",))
    seen = snapshot(breakers=Breakers(open=1, opened=1), history=outage(canary, stable))
    assert only(evaluate(trial, seen)).verdict.value == outcome
    closed = replace(seen, breakers=Breakers(open=0, opened=1))
    assert only(evaluate(trial, closed)).verdict is Outcome.PASS


def test_a_breaker_that_opened_on_fewer_failures_than_count_holds() -> None:
    """Those of a client that tries again count once, and what stable has no room for not at all."""
    trial = rollout(kinds=("breaker",))
    before = Sample(0.0, NOTHING, NOTHING)
    history = (before, Sample(1.0, (100, 0, 100, 0), (8, 1, 8, 1)))
    seen = snapshot(breakers=Breakers(open=1, opened=1), history=history)
    (found,) = evaluate(trial, seen)
    assert found.verdict is Outcome.HOLD
    assert "of late canary failed 1 of 8 requests (12.5 %)" in found.sentence
    assert found.sentence.endswith("8 failures must count: holds")


def test_a_breakers_failures_are_looked_for_as_far_back_as_they_are() -> None:
    """Another gateway's requests of the last seconds must not hide them."""
    trial = rollout(kinds=("breaker",))
    history = (
        Sample(0.0, NOTHING, NOTHING),
        Sample(1.0, (100, 0, 100, 0), (8, 7, 8, 7)),
        Sample(9.0, (900, 0, 900, 0), (20, 8, 20, 8)),
    )
    seen = snapshot(breakers=Breakers(open=1, opened=1), history=history)
    assert only(evaluate(trial, seen)).verdict is Outcome.FAIL


def test_what_a_plan_does_not_collect_is_not_said_to_be_waited_for() -> None:
    plain = rollout(kinds=("disagreement", "labels"))
    silent = replace(plain, spec=replace(plain.spec, shadow=None, feedback=None))
    disagreement, labels = evaluate(silent, snapshot({1: epoch(failures(9, 0), failures(9, 0))}))
    assert disagreement.sentence == "disagreement: the plan compares no shadow traffic: holds"
    assert labels.sentence == "labels: the plan has no feedback, so labels are not taken: holds"
    asked = replace(plain, spec=replace(plain.spec, shadow=Shadow(), feedback=Feedback()))
    for found in evaluate(asked, snapshot()):
        assert "waits for 50" in found.sentence


def test_what_compares_times_says_that_users_failed_in_so_many_requests() -> None:
    by_request = rollout(kinds=("breaker", "slo_burn"))
    trial = replace(by_request, spec=replace(by_request.spec, assignment=Assignment("header:u")))
    open_one = Breakers(open=1, opened=1)
    seen = snapshot(breakers=open_one, history=outage((10, 8), (950, 19)))
    breaker, burn = (v.sentence for v in evaluate(trial, seen))
    assert "of late canary failed 10 users in 110 requests (9.1 %), stable 57 users" in breaker
    assert "canary failed 68 users in 3010 requests (2.3 %) in the last 300 s" in burn
    assert not any("users" in v.sentence for v in evaluate(by_request, seen))


def steady(canary_failing: float, stable_failing: float, n: int = 50) -> tuple[Sample, ...]:
    """Ten minutes with `n` canary requests a second; stable, nine times as many, only in five."""
    samples = []
    for t in range(601):
        stable = 9 * n * min(t, 300)
        failed, stable_failed = round(n * t * canary_failing), round(stable * stable_failing)
        samples.append(
            Sample(float(t), (stable, stable_failed) * 2, (n * t, failed) * 2),
        )
    return tuple(samples)


@pytest.mark.parametrize(
    ("canary", "stable", "outcome"),
    [(0.05, 0.001, "fail"), (0.01, 0.001, "pass"), (0.05, 0.04, "pass"), (0.02, 0.02, "pass")],
)
def test_the_budget_burns_in_the_bake_too_unless_stable_burnt_it_likewise(
    canary: float, stable: float, outcome: str
) -> None:
    seen = snapshot(history=steady(canary, stable))
    verdict = only(evaluate(rollout(kinds=("slo_burn",)), seen))
    assert verdict.verdict.value == outcome


def test_what_little_stable_did_before_promotion_is_no_measure_of_it() -> None:
    # Both fail 2 %; of stable's last 60 requests before the bake none failed.
    ramp = [
        Sample(float(t), (180 * t, 18 * t // 5) * 2, (20 * t, 2 * t // 5) * 2) for t in range(500)
    ]
    last = ramp[-1]
    ramp.append(Sample(500.0, (last.stable[0] + 60, *last.stable[1:]), last.canary))
    bake = [
        Sample(500.0 + t, ramp[-1].stable, (last.canary[0] + 200 * t, last.canary[1] + 4 * t) * 2)
        for t in range(1, 298)
    ]
    verdict = only(evaluate(rollout(kinds=("slo_burn",)), snapshot(history=(*ramp, *bake))))
    assert verdict.verdict is not Outcome.FAIL
    assert "bound 6.0 %" in verdict.sentence


@pytest.mark.parametrize(("burnt", "outcome"), [(0.001, "fail"), (0.03, "pass")])
def test_in_the_bake_stables_worst_epoch_says_whether_the_objective_is_a_measure(
    burnt: float, outcome: str
) -> None:
    """All in all stable failed 0.3 %: in its worst tenth of an hour perhaps more than allowed."""
    nothing = ArmCountsRow()
    seen = snapshot(
        {
            1: epoch(nothing, failures(9 * 13_500, round(9 * 13_500 * 0.002))),
            2: epoch(nothing, failures(13_500, round(13_500 * burnt))),
            3: epoch(nothing, failures(LARGE - 1, LARGE - 1)),  # too little to say anything
        },
        history=steady(0.05, 0.003),
    )
    verdict = only(evaluate(rollout(kinds=("slo_burn",)), seen))
    assert verdict.verdict.value == outcome
    assert ("stable burnt the budget too, 3.0 % at worst" in verdict.sentence) == (burnt == 0.03)


def test_a_trigger_that_cannot_be_judged_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Verdict:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(cast(dict[str, Any], KINDS), "errors", broken)
    seen = snapshot(restarts=(990.0, 995.0))
    unknown, failed = evaluate(rollout(kinds=("errors", "crash_loop")), seen)
    assert unknown.verdict is Outcome.UNKNOWN
    assert unknown.sentence == (
        "errors: could not be judged (ZeroDivisionError: division by zero): holds"
    )
    assert failed.verdict is Outcome.FAIL


def test_a_burst_that_is_over_does_not_burn() -> None:
    before, quiet = steady(0.05, 0.0), 61
    last = before[-1].canary
    after = [
        Sample(600.0 + t, before[-1].stable, (last[0] + 50 * t, last[1]) * 2) for t in range(quiet)
    ]
    seen = snapshot(history=(*before, *after))
    assert only(evaluate(rollout(kinds=("slo_burn",)), seen)).verdict is Outcome.PASS


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (None, "hold"),
        (ProviderState("ok"), "pass"),
        (ProviderState("fail", fails=2), "hold"),
        (ProviderState("fail", fails=3, message="p99 is 2 s"), "fail"),
        (ProviderState("unknown", errors=9), "unknown"),
    ],
)
@pytest.mark.parametrize("kind", ["promql", "webhook"])
def test_a_provider_must_say_no_three_times_in_a_row(
    kind: str, state: ProviderState | None, outcome: str
) -> None:
    trial = rollout(kinds=(kind,))
    verdict = only(evaluate(trial, snapshot(providers={kind: state} if state else {})))
    assert verdict.verdict.value == outcome
    if state is not None:
        assert state.message in verdict.sentence


def test_a_bet_without_a_share_of_alpha_is_shown_and_never_fails() -> None:
    trial = rollout()
    unweighted = replace(default_trigger("errors"), weight=0.0)
    spec = replace(trial.spec, analysis=Analysis(triggers=(unweighted,)))
    counts = {1: epoch(failures(500, 500), failures(9500, 0))}
    verdict = only(evaluate(replace(trial, spec=spec), snapshot(counts)))
    assert (verdict.verdict, verdict.threshold) == (Outcome.HOLD, None)


def test_the_same_counts_give_the_same_verdicts() -> None:
    counts = {1: epoch(failures(240, 5), failures(4560, 9))}
    trial = replace(rollout(), spec=default_plan("canary"))
    again = Rollout.from_dict(trial.to_dict())
    copies = {n: EpochCounts.from_dict(c.to_dict()) for n, c in counts.items()}
    assert evaluate(trial, snapshot(counts)) == evaluate(again, snapshot(copies))


# What is frozen from stable.


def test_bounds_are_stables_quantiles_and_some() -> None:
    stable = answers(some_latencies(5000, 0.020))
    bounds = latency_bounds(stable)
    assert bounds is not None
    tail, body, alone = (LATENCY_BOUNDS[b] for b in bounds)
    p50, p99 = np.quantile(some_latencies(5000, 0.020), [0.5, 0.99])
    assert 1.1 <= tail / p99 <= 1.1 * 1.08
    assert 1.25 <= body / p50 <= 1.25 * 1.08
    assert 2.0 <= alone / p99 <= 2.0 * 1.08
    assert latency_bounds(answers(some_latencies(399, 0.020))) is None


def test_what_the_floor_says_is_noise_is_never_slow() -> None:
    stable = answers([0.0004] * 1000)
    for floor_s in (default_trigger("latency").floor_s, 0.002):
        bounds = latency_bounds(stable, floor_s)
        assert bounds is not None
        assert all(LATENCY_BOUNDS[bound] >= 0.0004 + floor_s for bound in bounds)
    assert default_trigger("latency").floor_s == 0.0005


@pytest.mark.parametrize(("floor_s", "factor"), [(0.0005, 5.0), (0.0, 2.0)])
def test_a_very_fast_version_that_becomes_slow_fails(floor_s: float, factor: float) -> None:
    # A median of 0.14 ms, and 99 % within 0.2 ms.
    def judged_at(slower: float) -> Outcome:
        stable = answers(some_latencies(9500, 0.00014))
        canary = answers(some_latencies(500, slower * 0.00014, seed=2))
        at = Epoch(1, 0, 0.05, latency_bounds=latency_bounds(stable, floor_s))
        trial = rollout(at, kinds=("latency",))
        return only(evaluate(trial, snapshot({1: epoch(canary, stable)}))).verdict

    assert np.quantile(some_latencies(9500, 0.00014), 0.99) < 0.000201
    assert judged_at(factor) is Outcome.FAIL
    assert judged_at(1.0) is not Outcome.FAIL


def test_bounds_move_when_stables_median_has_and_each_time_less_readily() -> None:
    frozen = latency_bounds(answers(some_latencies(2000, 0.020)))
    assert frozen is not None
    slower = answers(some_latencies(2000, 0.030, seed=2))
    for same in (answers(some_latencies(2000, 0.021, seed=2)), answers([0.030] * 999)):
        assert moved_bounds(frozen, same, 0) is None
    assert moved_bounds(frozen, slower, 0) == latency_bounds(slower)
    assert moved_bounds(frozen, slower, 1) == latency_bounds(slower)
    assert moved_bounds(frozen, slower, 2) is None
    quicker = answers(some_latencies(2000, 0.014, seed=2))
    assert moved_bounds(frozen, quicker, 0) == latency_bounds(quicker)


def test_no_bound_past_the_last_bucket() -> None:
    assert latency_bounds(answers([59.0] * 1000)) is None


def test_stables_latest_thousand_answers_set_the_bounds() -> None:
    old, new = answers([0.010] * 5000), answers([0.020] * 1500)
    counts = {1: EpochCounts(stable={"s": old}), 2: EpochCounts(stable={"s": new})}
    assert stable_so_far(counts) == new
    few = answers([0.020] * 10)
    assert stable_so_far({**counts, 3: EpochCounts(stable={"s": few})}).latency.total == 1510


# Statistics, on simulated traffic that is looked at every second.


def test_the_simulation_and_the_trigger_weigh_alike() -> None:
    rng = np.random.default_rng(11)
    weights = np.array([weight for weight, _ in PLAN])
    events = Events(0.01, 0.03, shared=0.4, canary_batch=3, one_replica=0.05)
    epochs = tuple(Epoch(i, i, weight) for i, (weight, _) in enumerate(PLAN))
    compared = 0
    for now, step, canary, stable in seconds(rng, 3, 100, events):
        if now % 50:
            continue
        upto = slice(0, step + 1)
        found = log_e(canary[:, :, upto], stable[:, :, upto], weights[upto], 4, 1.5, 0.001)
        for trial in range(3):
            counts = {
                i: EpochCounts(
                    stable={"s": row(stable[trial, 0, i])},
                    canary={name: row(canary[trial, r, i]) for r, name in enumerate("ab")},
                )
                for i in range(step + 1)
            }
            verdict = only(evaluate(rollout(*epochs[: step + 1]), snapshot(counts)))
            assert verdict.log_e == pytest.approx(spent(found[trial]), abs=1e-9)
            compared += 1
    assert compared == 18


def row(tally: np.ndarray[Any, Any]) -> ArmCountsRow:
    n, k, batches, failed = (int(x) for x in tally)
    return ArmCountsRow(requests=n, failed=k, batches=batches, failed_batches=failed)


TRIALS = 400
RAMP = tuple((percent / 100, 20) for percent in range(1, 31, 3))


def false_alarms(at: np.ndarray[Any, Any]) -> int:
    return int(np.isfinite(at).sum())


@pytest.mark.parametrize(("rate", "base"), [(200, 0.001), (200, 0.02), (10, 0.02)])
@pytest.mark.parametrize(
    ("events", "plan"),
    [
        (Events(0, 0), PLAN),
        (Events(0, 0, shared=1.0, canary_batch=2), PLAN),
        (Events(0, 0, shared=1.0, canary_batch=1), PLAN),
        (Events(0, 0, shared=0.5, canary_batch=2), PLAN),
        (Events(0, 0, drift=lambda second: 1 + 0.9 * np.sin(second / 40)), PLAN),
        (Events(0, 0, drift=lambda second: 1 + 0.9 * np.sin(second / 40)), RAMP),
        (Events(0, 0, one_replica=0.3), PLAN),
    ],
    ids=["independent", "batch of 2", "batch of 1", "mixed", "drift", "ramp", "bad replica"],
)
def test_healthy_versions_do_not_fail_for_errors(
    events: Events, plan: tuple[tuple[float, int], ...], rate: float, base: float
) -> None:
    rng = np.random.default_rng(3)
    healthy = replace(events, stable=base, canary=base)
    at = detections(seconds(rng, TRIALS, rate, healthy, plan), TRIALS, plan, ERRORS)
    assert false_alarms(at) <= 0.005 * TRIALS


@pytest.mark.parametrize("rate", [10, 200])
def test_healthy_versions_do_not_fail_for_users_who_fail_again_and_again(rate: float) -> None:
    rng = np.random.default_rng(4)
    at = detections(sticky(rng, TRIALS, rate, 0.005), TRIALS, PLAN, ERRORS)
    assert false_alarms(at) <= 0.005 * TRIALS


@pytest.mark.parametrize(
    ("share", "bet"), [(0.01, (1.0, 0.01)), (0.05, (1.0, 0.01)), (0.45, (1.5, 0.05))]
)
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_healthy_versions_do_not_fail_for_latency(
    share: float, bet: tuple[float, float], shared: float
) -> None:
    rng = np.random.default_rng(5)
    for one_replica in (None, 0.9):
        events = Events(
            share,
            share,
            shared=shared,
            canary_batch=4,
            one_replica=one_replica,
            drift=lambda second: 1 + 0.5 * np.sin(second / 40),
        )
        traffic = seconds(rng, 200, 100, events)
        at = detections(traffic, 200, PLAN, LATENCY, bets=(bet,), assigned=False)
        assert false_alarms(at) <= 1


def test_counted_one_by_one_failed_batches_would_be_false_alarms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout_traffic, "design_effect", lambda c: np.ones(np.shape(c)[:-1]))
    rng = np.random.default_rng(6)
    events = Events(0.02, 0.02, shared=1.0, canary_batch=2)
    at = detections(seconds(rng, 200, 200, events), 200, PLAN, ERRORS)
    assert false_alarms(at) > 0.3 * 200


def test_healthy_versions_do_not_burn_the_budget() -> None:
    rng = np.random.default_rng(7)
    trial = rollout(kinds=("slo_burn",))
    for base in (0.005, 0.02):
        for _ in range(20):
            canary = rng.binomial(20, base, 600).cumsum()
            stable = rng.binomial(180, base, 600).cumsum()
            history = tuple(
                Sample(
                    float(t),
                    (180 * (t + 1), int(stable[t])) * 2,
                    (20 * (t + 1), int(canary[t])) * 2,
                )
                for t in range(600)
            )
            for t in range(10, 600, 15):
                seen = snapshot(history=history[:t])
                assert only(evaluate(trial, seen)).verdict is not Outcome.FAIL


@pytest.mark.parametrize("stable_batch", [1, 4, 32])
def test_five_percent_of_errors_are_found_in_fifteen_seconds(stable_batch: int) -> None:
    rng = np.random.default_rng(8)
    events = Events(0.001, 0.05, stable_batch=stable_batch, canary_batch=min(2, stable_batch))
    # A minute in which stable alone is seen, as shadow traffic gives it; without, 32 take 15 s.
    plan = ((1e-9, 60), (0.05, 60))
    at = detections(seconds(rng, 300, 200, events, plan), 300, plan, ERRORS) - 60
    assert np.median(at) <= 13
    assert np.quantile(at, 0.95, method="lower") <= 30


@pytest.mark.parametrize(
    ("share", "canary", "bet"), [(0.009, 0.1, (1.0, 0.01)), (0.2, 0.9, (1.5, 0.05))]
)
def test_slow_versions_are_found(share: float, canary: float, bet: tuple[float, float]) -> None:
    rng = np.random.default_rng(9)
    plan = ((0.05, 120),)
    events = Events(share, canary, shared=0.9, stable_batch=4, canary_batch=1)
    traffic = seconds(rng, 300, 200, events, plan)
    at = detections(traffic, 300, plan, LATENCY, bets=(bet,), assigned=False)
    assert np.median(at) <= 25


# What clusters are worth.


@pytest.mark.parametrize("size", [2, 8, 32])
@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_correlation_within_batches_is_found_from_four_counts(size: int, shared: float) -> None:
    rng = np.random.default_rng(10)
    q = 0.02 * shared
    own = 1 - (1 - 0.02) / (1 - q)
    failed = (rng.random((40_000, 1)) < q) | (rng.random((40_000, size)) < own)
    counts = [failed.size, failed.sum(), len(failed), failed.any(axis=1).sum()]
    measured = np.corrcoef(failed[:, 0], failed[:, 1])[0, 1]
    assert correlation(counts) == pytest.approx(measured, abs=0.06)


def test_the_design_effect_goes_from_one_to_the_batch_size() -> None:
    assert design_effect([[32_000, 960, 1000, 30]]) == pytest.approx([32.0])
    assert design_effect([[32_000, 30, 1000, 30]]) == pytest.approx([1.0], abs=0.3)
    # Unknown is as bad as can be, and so is a batch larger than most that fails.
    assert design_effect([[3200, 0, 100, 0]]) == pytest.approx([32.0])
    assert design_effect([[3200, 64, 400, 1]]) == pytest.approx([64.0])
    # What was learnt in one epoch holds in the next, at its batch size.
    first, second = design_effect([[32_000, 960, 1000, 30], [800, 0, 100, 0]])
    assert (first, second) == pytest.approx((32.0, 8.0))
    assert design_effect(np.zeros((3, 0, 4))).shape == (3, 0)
