"""How long a plan takes at some traffic."""

from __future__ import annotations

from dataclasses import replace

from serving.core.rollout_spec import Assignment, InsufficientData, default_plan
from serving.core.rollout_timing import StepTime, step_times

CANARY = default_plan("canary")


def test_with_enough_traffic_steps_take_their_holds() -> None:
    shadow, *steps = step_times(CANARY, 200.0)
    assert shadow == StepTime(-1, 2000, 50.0)
    assert steps == [StepTime(i, 50, s) for i, s in enumerate((120, 300, 300, 300))]


def test_a_step_takes_as_long_as_its_requests_do() -> None:
    shadow, first, second, *_ = step_times(CANARY, 5.0)
    assert shadow.seconds == 900
    assert (first.seconds, second.seconds) == (1000, 300)


def test_with_too_little_traffic_it_is_not_over_by_itself() -> None:
    _, *steps = step_times(CANARY, 0.5)
    assert [(s.seconds, s.timeout) for s in steps] == [
        (None, "pause"),
        (2000, None),
        (400, None),
        (300, None),
    ]
    assert all(s.timeout == "pause" for s in step_times(CANARY, 0.0)[1:])
    rule = InsufficientData(60, "proceed")
    goes_on = replace(CANARY, analysis=replace(CANARY.analysis, on_insufficient_data=rule))
    assert step_times(goes_on, 0.0)[1] == StepTime(0, 50, 180, "proceed")


def test_what_compares_nothing_needs_no_traffic() -> None:
    dry = replace(CANARY, analysis=replace(CANARY.analysis, dry_run=True))
    bare = replace(CANARY, analysis=replace(CANARY.analysis, triggers=()))
    for plan in (dry, bare, replace(bare, assignment=Assignment("header:user"))):
        assert [s.seconds for s in step_times(plan, 0.0)[1:]] == [120, 300, 300, 300]
    gate = step_times(default_plan("shadow-only"), 0.0)
    assert gate[1:] == (StepTime(0, 0, 0.0),)


def test_without_steps_the_shadow_has_to_give_some_pairs() -> None:
    at_once = default_plan("blue-green")
    assert step_times(at_once, 200.0) == (StepTime(-1, 2000, 50.0),)
    assert step_times(at_once, 1.0) == (StepTime(-1, 2000, 900.0),)
    assert step_times(at_once, 0.2) == (StepTime(-1, 50, 1250.0),)
    assert step_times(at_once, 0.0) == (StepTime(-1, 50, None, "pause"),)
    rule = InsufficientData(60, "proceed")
    goes_on = replace(at_once, analysis=replace(at_once.analysis, on_insufficient_data=rule))
    assert step_times(goes_on, 0.0) == (StepTime(-1, 50, 960.0, "proceed"),)
    dry = replace(at_once, analysis=replace(at_once.analysis, dry_run=True))
    assert step_times(dry, 0.0) == (StepTime(-1, 2000, 900.0),)
