"""Cost per inference: the windows in which it compares, and what is said where it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from random import Random
from typing import Any

import pytest

from serving.core.rollout_costs import (
    EQUAL,
    after_look,
    at_equal_size,
    independent,
    log_ratios,
    mark,
    windows_from_dict,
    windows_to_dict,
)
from serving.core.rollout_counts import ArmCountsRow, EpochCounts, Histogram
from serving.core.rollout_facts import CostMark, CostWindow, CostWindows
from serving.core.rollout_spec import Step
from serving.core.rollout_types import Epoch, Outcome, Rollout, State, Verdict
from serving.core.triggers import evaluate
from tests.core.test_evidence import COST_RATIOS
from tests.core.test_triggers import only, rollout, snapshot

PRICES = {"s": 3.6, "c": 3.6}
MS = 10**6


def row(inferences: int, ms: float) -> ArmCountsRow:
    """Answered requests that had the device for `ms` each."""
    latency = Histogram({60: inferences}) if inferences else Histogram()
    return ArmCountsRow(
        inferences, batches=inferences, latency=latency, busy_ns=int(inferences * ms * MS)
    )


def both(canary_ms: float, stable_ms: float = 1.0, inferences: int = 100) -> EpochCounts:
    return EpochCounts({"s": row(inferences, stable_ms)}, {"c": row(inferences, canary_ms)})


def windows(ratios: Sequence[float]) -> CostWindows:
    """Windows with these ln(canary / stable), 100 inferences each."""
    return CostWindows(
        closed=tuple(CostWindow({"c": (100 * exp(r), 100)}, (100, 100)) for r in ratios)
    )


def judged(counts: EpochCounts, weight: float = EQUAL, **seen: Any) -> Verdict:
    trial = rollout(Epoch(1, 0, weight), kinds=("cost",), state=State.OBSERVING, step=3)
    return only(evaluate(trial, snapshot({1: counts}, **{"prices": PRICES, **seen})))


def test_what_clients_gave_up_is_no_inference() -> None:
    answered = both(1.0)
    late = replace(answered.canary["c"], latency=Histogram({60: 100, 90: 50}), given_up=50)
    gave_up = replace(answered, canary={"c": late})
    assert judged(gave_up).sentence == judged(answered).sentence


def test_a_dearer_canary_is_shown_and_not_judged_at_a_small_weight() -> None:
    verdict = judged(both(2.0), weight=0.05, costs=CostWindows())
    assert verdict.verdict is Outcome.HOLD
    assert verdict.sentence == (
        "cost: canary cost $0.002 per 1,000 (2 ms of its device each), stable cost $0.001 per "
        "1,000 (1 ms of its device each): 2 times (tolerated: 1.05); a gauge only: 0 of 8 windows "
        "in which both versions were of equal size"
    )
    verdict = judged(both(2.0), weight=0.05)
    trial = replace(rollout(Epoch(1, 1, 0.05), kinds=("cost",)), state=State.OBSERVING, step=1)
    seen = snapshot({1: both(2.0)}, prices=PRICES)
    assert (
        "no baseline of the canary's size before the step of 50 %"
        in only(evaluate(trial, seen)).sentence
    )
    steps = (Step(5, 60), Step(20, 60))
    other = replace(trial, spec=replace(trial.spec, steps=steps))
    assert only(evaluate(other, seen)).sentence.endswith("this plan has no step of 50 %")


def test_at_equal_size_it_is_judged_by_its_windows() -> None:
    verdict = judged(both(1.15), costs=windows(COST_RATIOS))
    assert (verdict.verdict, verdict.action) == (Outcome.FAIL, "pause")
    assert verdict.log_e == pytest.approx(6.592735, abs=1e-6)
    assert verdict.threshold == pytest.approx(log(1 / 0.0015))
    assert "at equal size 1.15 times in 10 windows (tolerated: 1.05)" in verdict.sentence
    # As a passing version is found: the same, turned around.
    assert judged(both(0.9), costs=windows([-r for r in COST_RATIOS])).verdict is Outcome.PASS
    assert judged(both(1.15), costs=windows(COST_RATIOS[:7])).verdict is Outcome.HOLD


def test_healthy_versions_are_left_alone() -> None:
    """200 rollouts with the same version in both arms, looked at after every window."""
    random = Random(7)
    failed = 0
    for _ in range(200):
        ratios = [random.gauss(0.0, 0.05) for _ in range(40)]
        failed += any(
            judged(both(1.0), costs=windows(ratios[:n])).verdict is Outcome.FAIL
            for n in range(8, 41, 4)
        )
    assert failed == 0


def test_evidence_must_not_hang_on_one_replica() -> None:
    slow = [
        CostWindow({"a": (100.0 + i % 3, 100), "b": (200.0 + i % 3, 100)}, (200.0, 200))
        for i in range(20)
    ]
    verdict = judged(both(1.5), costs=CostWindows(closed=tuple(slow)))
    assert verdict.verdict is Outcome.HOLD
    assert "it all comes from replica b" in verdict.sentence
    alike = [CostWindow(dict.fromkeys("ab", (200.0 + i % 3, 100)), (200.0, 200)) for i in range(20)]
    assert judged(both(2.0), costs=CostWindows(closed=tuple(alike))).verdict is Outcome.FAIL


def test_without_a_price_it_says_which_replica_and_how_long() -> None:
    verdict = judged(both(2.0), prices={"s": 3.6, "c": None}, costs=windows(COST_RATIOS))
    assert verdict.verdict is Outcome.HOLD
    assert "took 2 ms of its device an inference" in verdict.sentence
    assert verdict.sentence.endswith("2 times; a gauge only: the price of replica c is not known")


@pytest.mark.parametrize("counts", [EpochCounts(), both(2.0, inferences=0)])
def test_without_answers_it_waits(counts: EpochCounts) -> None:
    verdict = judged(counts)
    assert verdict.sentence == "cost: waits for answers of both versions at the same time"


def test_windows_that_follow_each_other_are_lengthened() -> None:
    random = Random(1)
    noise = [random.gauss(0.0, 0.05) for _ in range(64)]
    assert len(independent(windows(noise).closed, 8)) == 64
    wave = [0.1 if i // 4 % 2 else -0.1 for i in range(64)]
    assert len(independent(windows(wave).closed, 8)) == 32
    # Never so long that too few are left.
    assert len(independent(windows([i / 100 for i in range(64)]).closed, 8)) == 8


# How windows are cut.


def equal(**changes: Any) -> Rollout:
    return replace(
        rollout(Epoch(1, 0, 0.05), Epoch(2, 3, EQUAL)), state=State.OBSERVING, step=3, **changes
    )


def test_arms_are_of_equal_size_with_half_of_the_requests_and_as_many_replicas() -> None:
    assert at_equal_size(equal(), 2, 2)
    assert not at_equal_size(equal(), 1, 2)
    assert not at_equal_size(equal(), 0, 0)
    assert not at_equal_size(equal(canary_lost_at=1.0), 2, 2)
    assert not at_equal_size(replace(equal(), step=1), 2, 2)


def cut(
    costs: CostWindows,
    at: float,
    counts: EpochCounts,
    prices: dict[str, float | None] | None = None,
) -> CostWindows:
    known = {**PRICES} if prices is None else prices
    small = both(9.0)
    return after_look(costs, mark(equal(), {1: small, 2: counts}, at), known)


def test_a_window_has_time_and_inferences_enough() -> None:
    costs = cut(CostWindows(), 0.0, both(2.0, inferences=50))
    assert costs.closed == ()
    assert cut(costs, 9.0, both(2.0, inferences=150)).closed == ()
    assert cut(costs, 60.0, both(2.0, inferences=79)).closed == ()
    costs = cut(costs, 10.0, both(2.0, inferences=150))
    # 100 inferences of 2 ms at $3.60 an hour; what was before the step of 50 % is not in it.
    [window] = costs.closed
    assert window.canary == {"c": (pytest.approx(200_000), 100)}
    assert window.stable == (pytest.approx(100_000), 100)
    assert log_ratios(costs.closed) == [pytest.approx(log(2))]
    assert len(cut(costs, 20.0, both(2.0, inferences=250)).closed) == 2


def test_a_window_with_a_change_of_size_in_it_is_dropped() -> None:
    costs = cut(CostWindows(), 0.0, both(2.0, inferences=50))
    costs = after_look(costs, None, PRICES)
    costs = cut(costs, 10.0, both(2.0, inferences=150))
    assert costs.closed == ()
    assert len(cut(costs, 20.0, both(2.0, inferences=250)).closed) == 1


def test_a_window_without_a_price_is_dropped() -> None:
    costs = cut(CostWindows(), 0.0, both(2.0, inferences=50))
    costs = cut(costs, 10.0, both(2.0, inferences=150), {"s": 3.6})
    assert costs.closed == ()
    assert costs.since is not None
    assert costs.since.at == 10.0


def test_counts_that_are_not_all_there_after_a_restart_are_waited_for() -> None:
    costs = cut(CostWindows(), 0.0, both(2.0, inferences=500))
    assert cut(costs, 30.0, both(2.0, inferences=100)) == costs
    assert cut(costs, 30.0, EpochCounts()) == costs
    assert len(cut(costs, 40.0, both(2.0, inferences=700)).closed) == 1


def test_a_long_step_has_fewer_and_longer_windows() -> None:
    costs = CostWindows()
    for i in range(400):
        costs = cut(costs, 10.0 * i, both(2.0, inferences=100 * (i + 1)))
    assert costs.width_s == 20.0
    assert 128 < len(costs.closed) < 256
    total = sum(n for w in costs.closed for _, n in w.canary.values())
    assert total == pytest.approx(100 * 399, abs=200)
    assert log_ratios(costs.closed) == pytest.approx([log(2)] * len(costs.closed))


def test_windows_survive_a_restart() -> None:
    costs = CostWindows(CostMark(1.0, {"c": (5, 6)}, {}), windows(COST_RATIOS).closed, 20.0)
    for found in (costs, CostWindows()):
        assert windows_from_dict(json.loads(json.dumps(windows_to_dict(found)))) == found
