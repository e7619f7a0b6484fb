from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving.core.detect import (
    Detection,
    Regression,
    Traffic,
    detections,
    seconds_to_break,
    seconds_to_detect,
)
from serving.core.evidence import log_threshold
from serving.core.rollout_counts import LATENCY_BOUNDS, ArmCountsRow, Histogram
from serving.core.rollout_spec import (
    Analysis,
    RolloutSpec,
    Shadow,
    Step,
    default_plan,
    default_trigger,
)
from serving.core.two_arms import Null
from tests.core import rollout_traffic
from tests.core.rollout_traffic import Events

ERRORS = default_trigger("errors")
NULL = Null(ERRORS.r0, ERRORS.delta)


def spec(*steps: tuple[float, float]) -> RolloutSpec:
    return RolloutSpec(steps=tuple(Step(weight=w, hold_s=s) for w, s in steps))


def stable(failing: float = 0.001) -> ArmCountsRow:
    latencies = np.random.default_rng(1).lognormal(np.log(0.010), 0.2, 20_000)
    buckets = np.bincount(np.searchsorted(LATENCY_BOUNDS, latencies)).tolist()
    return ArmCountsRow(
        requests=20_000,
        failed=round(20_000 * failing),
        latency=Histogram({b: n for b, n in enumerate(buckets) if n}),
    )


@pytest.mark.parametrize(
    ("per_s", "failing", "canary"),
    [(200, 0.001, 0.05), (200, 0.001, 0.02), (50, 0.01, 0.2), (1000, 0.005, 0.03)],
)
def test_the_expected_time_is_what_a_simulation_takes(
    per_s: float, failing: float, canary: float
) -> None:
    plan = ((0.01, 120), (0.05, 300))
    regression = Regression(NULL, canary, failing)
    expected = seconds_to_detect(
        spec(*((w * 100, s) for w, s in plan)),
        Traffic(per_s, stable(failing)),
        ERRORS,
        [regression],
    )
    events = Events(failing, canary, stable_batch=1)
    traffic = rollout_traffic.seconds(np.random.default_rng(2), 300, per_s, events, plan)
    found = rollout_traffic.detections(traffic, 300, plan, log_threshold(ERRORS.weight, 0.01))
    assert expected == pytest.approx(float(np.median(found)), rel=0.3)


def test_a_late_regression_is_timed_from_its_beginning() -> None:
    plan = ((0.01, 60), (0.05, 100), (0.25, 100))
    regression = Regression(NULL, 0.05, 0.005, since=2)
    expected = seconds_to_detect(
        spec(*((w * 100, s) for w, s in plan)), Traffic(200, stable(0.005)), ERRORS, [regression]
    )
    rng = np.random.default_rng(3)
    well = Events(0.005, 0.005, stable_batch=1)
    bad = replace(well, canary=0.05)

    def traffic():
        *_, (_, _, canary_before, stable_before) = rollout_traffic.seconds(
            rng, 300, 200, well, plan[:2]
        )
        for now, _, canary, stable_ in rollout_traffic.seconds(rng, 300, 200, bad, plan[2:]):
            yield (
                now,
                2,
                np.concatenate([canary_before, canary], axis=2),
                np.concatenate([stable_before, stable_], axis=2),
            )

    found = rollout_traffic.detections(traffic(), 300, plan, log_threshold(ERRORS.weight, 0.01))
    assert expected == pytest.approx(float(np.median(found)), rel=0.3)


def test_less_than_tolerated_is_never_detected() -> None:
    regression = Regression(NULL, 0.002, 0.001)
    assert seconds_to_detect(spec((50, 1e6)), Traffic(200, stable()), ERRORS, [regression]) is None


def test_two_replicas_take_longer_than_one_as_either_must_do() -> None:
    regression = [Regression(NULL, 0.05, 0.001)]
    one, two = (
        seconds_to_detect(spec((5, 300)), Traffic(200, stable(), replicas), ERRORS, regression)
        for replicas in (1, 2)
    )
    assert one is not None
    assert two is not None
    assert 1.7 * one < two < 2.4 * one


def test_a_breaker_opens_after_a_run_of_failures() -> None:
    plan = replace(spec((5, 60), (50, 60)), breaker_failures=8)
    traffic = Traffic(200, stable())
    assert seconds_to_break(plan, traffic, 1.0) == pytest.approx(0.8)
    rng = np.random.default_rng(4)
    waits = []
    for _ in range(300):
        run = n = 0
        while run < 8:
            n += 1
            run = run + 1 if rng.random() < 0.8 else 0
        waits.append(n / 10)
    assert seconds_to_break(plan, traffic, 0.8) == pytest.approx(np.mean(waits), rel=0.2)
    # Past the first step the canary gets more.
    assert seconds_to_break(plan, traffic, 0.45) == pytest.approx(
        60 + (1081.3 - 600) / 100, rel=0.01
    )
    assert seconds_to_break(plan, traffic, 0.05) is None


def by_words(found: tuple[Detection, ...]) -> dict[str, Detection]:
    return {detection.regression: detection for detection in found}


def test_the_outlook_of_the_default_plan() -> None:
    found = by_words(detections(default_plan("canary"), Traffic(200, stable())))
    assert list(found) == [
        "1% of requests fail",
        "5% of requests fail",
        "20% of requests fail",
        "100% of requests fail",
        "5% of requests fail from step 4 on",
        "every request takes 1.5 times as long",
        "every request takes 2 times as long",
        "every request takes 5 times as long",
        "5% of answers differ from stable's",
        "10% of answers differ from stable's",
        "30% of answers differ from stable's",
    ]
    everything = found["100% of requests fail"]
    assert (everything.trigger, everything.step) == ("breaker", 0)
    assert everything.seconds == pytest.approx(4.0)
    assert everything.bad_answers == pytest.approx(8)

    some = found["5% of requests fail"]
    assert (some.trigger, some.step) == ("errors", 0)
    assert some.seconds is not None
    assert some.bad_answers == pytest.approx(200 * 0.01 * some.seconds * 0.05)
    late = found["5% of requests fail from step 4 on"]
    assert late.step == 3
    assert late.seconds is not None
    assert late.seconds < some.seconds

    slow = found["every request takes 1.5 times as long"]
    assert (slow.trigger, slow.step) == ("latency", 0)
    shadowed = found["10% of answers differ from stable's"]
    assert (shadowed.trigger, shadowed.step, shadowed.bad_answers) == ("disagreement", -1, 0.0)


def test_what_is_noticed_in_a_later_step_counts_bad_answers_of_all() -> None:
    plan = spec((1, 120), (50, 600))
    one_percent = by_words(detections(plan, Traffic(50, stable())))["1% of requests fail"]
    assert one_percent.step == 1
    assert one_percent.seconds is not None
    hits = 50 * 0.01 * (0.01 * 120 + 0.5 * (one_percent.seconds - 120))
    assert one_percent.bad_answers == pytest.approx(hits)


def test_what_the_plan_is_over_before_is_said_to_be_missed() -> None:
    plan = spec((1, 10))
    found = by_words(detections(plan, Traffic(1, stable())))["5% of requests fail"]
    assert (found.trigger, found.seconds, found.step) == ("errors", None, None)
    # Of half an hour more than its hold, in which the step waits for requests.
    assert found.bad_answers == pytest.approx(1810 * 0.01 * 0.05)


def test_a_step_that_waits_for_its_requests_has_that_long_to_notice() -> None:
    plan = spec((5, 10))
    found = by_words(detections(plan, Traffic(1, stable())))["20% of requests fail"]
    assert found.seconds is not None
    assert 10 < found.seconds <= 1000


def test_what_cannot_be_judged_is_left_out() -> None:
    unknown = Traffic(10, ArmCountsRow())
    words = by_words(detections(spec((5, 60)), unknown))
    assert all("fail" in regression for regression in words)
    already = by_words(detections(spec((5, 60)), Traffic(10, stable(0.1))))
    assert "5% of requests fail" not in already

    no_triggers = replace(default_plan("canary"), analysis=Analysis(triggers=()))
    assert detections(no_triggers, Traffic(200, stable())) == ()
    assert detections(spec(), Traffic(200, stable()))[0].seconds is None


def test_a_shadow_that_compares_nothing_detects_nothing() -> None:
    shadow = Shadow()
    silent = replace(shadow, compare=replace(shadow.compare, kind="none"))
    found = by_words(detections(RolloutSpec(shadow=silent), Traffic(200, stable())))
    assert not any("differ" in words for words in found)
