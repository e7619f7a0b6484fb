"""The bake: a canary without stable beside it, held against what stable did before."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest

from serving.core.evidence import log_e_bounded, log_threshold
from serving.core.one_arm import (
    BAKE,
    BASELINE,
    PARTS,
    STEPS,
    Tolerance,
    Watch,
    part_at,
    parts,
    spent,
)
from serving.core.rollout import State
from serving.core.rollout_counts import ArmCountsRow, EpochCounts
from serving.core.rollout_spec import Bake, Step, Trigger, default_trigger
from serving.core.rollout_types import Epoch
from serving.core.two_arms import Null
from tests.core.rollouts import World, analysis, plan, world

ERRORS = Tolerance(Null(1.5, 0.001), margin=0.01, risk=1e-4)
LAST = 4


def failures(n: int, k: int) -> ArmCountsRow:
    """Requests in batches of their own."""
    return ArmCountsRow(requests=n, failed=k, batches=n, failed_batches=k)


def table(*rows: tuple[int, int]) -> np.ndarray:
    return np.array([(n, k, n, k) for n, k in rows], float).reshape(-1, 4)


def watch(
    *bake: tuple[int, int], stable: tuple[int, int] = (100_000, 100), planned: int = 12
) -> Watch:
    """One replica's counts in each part of the bake so far."""
    epochs = [Epoch(0, 0, 0.5)]
    counts = {0: EpochCounts(stable={"s": failures(*stable)}, canary={"a": failures(100, 100)})}
    for part, found in enumerate(bake):
        epochs.append(Epoch(part + 1, LAST, 1.0, part=part))
        counts[part + 1] = EpochCounts(canary={"a": failures(*found)})
    return Watch(epochs, counts, lambda row: row.failures, ERRORS, last=LAST, planned=planned)


def test_the_budget_is_spent_once() -> None:
    assert pytest.approx(1.0) == STEPS + BAKE + BASELINE
    assert exp(spent(log(20), log(300))) == pytest.approx(0.9 * 20 + 0.05 * 300)
    # Far beyond what a float's exponential can hold.
    assert spent(3000.0, -5000.0) == pytest.approx(3000 + log(0.9))


@pytest.mark.parametrize(
    ("duration", "count"), [(0, 1), (10, 1), (599, 1), (600, 2), (3600, 12), (86_400, PARTS)]
)
def test_parts_are_of_five_minutes_or_a_twelfth_of_the_bake(duration: float, count: int) -> None:
    assert parts(duration) == count
    assert [part_at(s, duration) for s in (-5, 0, duration, 2 * duration)] == [
        0,
        0,
        *[count - 1] * 2,
    ]


def test_tolerated_is_thrice_stables_rate_or_a_point_more() -> None:
    assert ERRORS.of(table((1_000_000, 100))) == pytest.approx(0.0101, abs=1e-4)
    assert ERRORS.of(table((1_000_000, 20_000))) == pytest.approx(0.06, rel=0.05)
    # What little is known could be anything.
    assert ERRORS.of(table((50, 0))) > 0.3
    assert ERRORS.of(table()) >= 1
    # The worst epoch that says enough counts, one of few units does not.
    alike, worst = table((100_000, 1000), (10_000, 300)), table((100_000, 1000), (500, 50))
    assert ERRORS.of(alike) > 0.09
    assert ERRORS.of(worst) == pytest.approx(0.036, abs=0.003)
    # A plan that allows more beside stable allows it in the bake.
    assert replace(ERRORS, null=Null(1.0, 0.2)).of(table((1_000_000, 100))) > 0.2


def test_a_failed_batch_is_one_event() -> None:
    together = np.array([(100_000, 3200, 3125, 100)], float)
    one_by_one = np.array([(100_000, 3200, 3125, 2000)], float)
    assert ERRORS.of(together) > ERRORS.of(one_by_one) > 3 * 0.032


def test_evidence_is_the_average_of_copies_started_at_each_part() -> None:
    found = watch((10_000, 10), (10_000, 10), (1000, 100), planned=4)
    copies = [
        log_e_bounded(k, n, found.tolerated, 0.5, 5.0)
        for n, k in ((21_000, 120), (11_000, 110), (1000, 100))
    ]
    assert found.canary == (21_000, 120)
    assert found.clusters == 120
    assert found.log_e == pytest.approx(log(sum(map(exp, (*copies, 0.0))) / 4))
    assert copies[2] > 50 > copies[0]


def test_without_a_bake_or_a_baseline_there_is_no_evidence() -> None:
    assert (watch().log_e, watch().canary, watch().without) == (0.0, (0, 0), {})
    nothing_known = watch((1000, 1000), stable=(0, 0))
    assert nothing_known.tolerated >= 1
    assert nothing_known.log_e == 0.0


def test_stable_that_came_back_in_the_bake_does_not_move_the_bound() -> None:
    usual = watch((1000, 5)).tolerated
    epochs = [
        Epoch(0, 0, 0.5),
        Epoch(1, LAST, 1.0),
        Epoch(2, LAST, 0.0),  # the canary was away
        Epoch(3, LAST, 1.0, part=1),
    ]
    counts = {
        0: EpochCounts(stable={"s": failures(100_000, 100)}),
        1: EpochCounts(canary={"a": failures(500, 2)}),
        2: EpochCounts(stable={"s": failures(100_000, 50_000)}),
        3: EpochCounts(canary={"a": failures(500, 3)}),
    }
    found = Watch(epochs, counts, lambda row: row.failures, ERRORS, last=LAST, planned=12)
    assert found.tolerated == usual
    assert found.canary == (1000, 5)


# A whole rollout, second by second.


def baking(*more: Trigger) -> World:
    spec = plan(
        steps=(Step(25, 60), Step(50, 60)),
        bake=Bake(3600),
        # Without the trigger that looks at budgets: errors and latency must do it alone.
        analysis=analysis(*more),
    )
    w = world(spec).to(State.BAKING)
    for _ in range(20):
        w.tick(60)
    assert w.rollout.state is State.BAKING
    return w


def test_errors_that_begin_in_the_bake_take_the_version_back() -> None:
    w = baking()
    began, w.canary_fails = w.now, 0.10
    w.to(State.ROLLING_BACK)
    assert w.now - began < 60
    assert w.rollout.weight == 0
    assert w.rollout.reason.startswith("errors: canary failed 0 of ")
    assert "; in the bake failed " in w.rollout.reason
    assert "tolerated: 1." in w.rollout.reason


def test_a_version_that_becomes_slow_in_the_bake_is_taken_back() -> None:
    w = baking()
    began, w.canary_slower = w.now, 16  # three times as slow
    w.to(State.ROLLING_BACK)
    assert w.now - began < 60
    assert w.rollout.reason.startswith("latency: longer than ")
    assert "; in the bake longer than " in w.rollout.reason


def test_answers_that_are_wrong_in_the_bake_take_the_version_back() -> None:
    w = baking(default_trigger("labels"))
    labelled = EpochCounts(stable={"s": ArmCountsRow(labels=(2000, 60))})
    step = next(e.epoch for e in w.rollout.epochs if e.weight == 0.5)
    w.counts[step] += labelled
    w.tick()
    w.counts[w.rollout.epoch] += EpochCounts(canary={"a": ArmCountsRow(labels=(1000, 80))})
    assert w.tick().state is State.BAKING
    w.counts[w.rollout.epoch] += EpochCounts(canary={"a": ArmCountsRow(labels=(400, 380))})
    assert w.tick().state is State.ROLLING_BACK
    assert w.rollout.reason.startswith("labels: canary was wrong in 0 of 0 ")
    assert "; in the bake wrong 460 of 1400" in w.rollout.reason


@pytest.mark.parametrize(("fails", "slower"), [(0.008, 0), (0.0, 9)])
def test_what_a_bad_hour_may_do_is_tolerated_in_the_bake(fails: float, slower: int) -> None:
    w = baking()
    w.canary_fails, w.canary_slower = fails, slower
    while w.rollout.active:
        w.tick(10)
    assert w.rollout.state is State.SUCCEEDED


def test_a_bad_replica_does_not_take_the_version_back() -> None:
    epochs = [Epoch(0, 0, 0.5), Epoch(1, LAST, 1.0)]
    replicas = {"a": failures(10_000, 5000), "b": failures(10_000, 10)}
    counts = {
        0: EpochCounts(stable={"s": failures(100_000, 100)}),
        1: EpochCounts(canary=replicas),
    }
    found = Watch(epochs, counts, lambda row: row.failures, ERRORS, last=LAST, planned=12)
    threshold = log_threshold(default_trigger("errors").weight, 0.01)
    assert spent(0.0, found.log_e) > threshold
    assert min(found.without, key=found.without.__getitem__) == "a"
    assert spent(0.0, found.without["a"]) < 0
    assert spent(0.0, found.without["b"]) > threshold


def test_an_error_that_began_before_the_bake_is_still_found_in_it() -> None:
    """The comparison's evidence is not lost when its last answers come after promotion."""
    w = baking()
    step = next(e.epoch for e in w.rollout.epochs if e.weight == 0.5)
    late = EpochCounts(canary={"a": failures(400, 400), "b": failures(400, 400)})
    w.counts[step] = w.counts[step] + late
    assert w.tick().state is State.ROLLING_BACK
    assert w.rollout.reason.startswith("errors: canary failed 800 of ")
