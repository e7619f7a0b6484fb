"""Requests that are drawn together are one unit of chance, and evidence holds if so counted."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from serving.core.evidence import ArmCounts, Period, log_e_two_arms
from tests.core import rollout_traffic
from tests.core.rollout_traffic import PLAN, Moments, detections, drawn_together
from tests.core.test_triggers import ERRORS, LATENCY, false_alarms

GROUPS = {
    "moments": Moments(0.02),
    "one draw": Moments(0.02, blip_s=0.0),
    "rare moments": Moments(0.002, blips=0.2),
    "all kinds": Moments(0.02, blips=1 / 3, shared=0.5, draw=32),
}


@pytest.mark.parametrize("rate", [2000, 20_000])
@pytest.mark.parametrize("moments", GROUPS.values(), ids=GROUPS)
def test_healthy_versions_do_not_fail_where_requests_are_drawn_together(
    moments: Moments, rate: float
) -> None:
    rng = np.random.default_rng(8)
    at = detections(drawn_together(rng, 200, rate, moments), 200, PLAN, ERRORS)
    assert false_alarms(at) <= 0.005 * 200
    rng = np.random.default_rng(9)
    traffic = drawn_together(rng, 100, rate, moments)
    at = detections(traffic, 100, PLAN, LATENCY, bets=((1.0, 0.01),), assigned=False)
    assert false_alarms(at) <= 1


def test_counted_one_by_one_requests_drawn_together_would_be_false_alarms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout_traffic, "design_effect", lambda c: np.ones(np.shape(c)[:-1]))
    rng = np.random.default_rng(10)
    at = detections(drawn_together(rng, 100, 2000, GROUPS["moments"]), 100, PLAN, ERRORS)
    assert false_alarms(at) > 0.3 * 100


def test_a_failed_draw_is_one_bet_however_many_requests_it_has() -> None:
    """The draw is the unit of chance: over how it falls the capital does not grow on average."""
    failed = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    for weight in (0.05, 0.5):
        mean, as_requests = 0.0, 0.0
        for arms in product((True, False), repeat=len(failed)):
            chance = np.prod([weight if arm else 1 - weight for arm in arms])
            canary = ArmCounts(
                sum(arms), sum(y for y, arm in zip(failed, arms, strict=True) if arm)
            )
            stable = ArmCounts(len(arms) - canary.n, sum(failed) - canary.k)
            for draw in (1, 16):
                period = Period(
                    weight,
                    ArmCounts(canary.n * draw, canary.k * draw),
                    ArmCounts(stable.n * draw, stable.k * draw),
                )
                capital = chance * np.exp(log_e_two_arms([period], 1.0, 0.001))
                if draw == 1:
                    mean += capital
                else:
                    as_requests += capital
        assert mean <= 1.0
        assert as_requests > 10.0
