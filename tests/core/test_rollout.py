"""What a tick decides, and the sentence that says what comes next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serving.core.rollout import Rollout, State, decide
from serving.core.rollout_clocks import left_out, unwatched_s
from serving.core.rollout_facts import CanaryGpu
from serving.core.rollout_outlook import next_sentence
from serving.core.rollout_progress import due_hooks
from serving.core.rollout_spec import (
    Bake,
    Gate,
    InsufficientData,
    ProviderErrors,
    RolloutSpec,
    Step,
    Webhook,
    default_plan,
    default_trigger,
)
from serving.core.rollout_states import PAUSABLE
from serving.core.rollout_types import ProviderState
from serving.errors import ConflictError
from tests.core.rollouts import OK, PLAN, QUEUE, START, World, analysis, plan, stored, world

SILENT = ProviderState("unknown", errors=5, message="connection refused")
BAD = ProviderState("fail", fails=3, message="value 7")


def gated(**gate: object) -> RolloutSpec:
    return plan(steps=(Step(5, 60, gate=Gate(**gate)), Step(50, 60)))  # type: ignore[arg-type]


def weights(rollout: Rollout) -> list[float]:
    return [e.weight for e in rollout.epochs]


# The way of a healthy version.


def test_a_healthy_version_goes_all_the_way() -> None:
    w = world()
    states = []
    while w.rollout.active:
        if not states or states[-1] != (w.rollout.state, w.rollout.step):
            states.append((w.rollout.state, w.rollout.step))
        w.tick()
    assert states == [
        (State.PENDING, -1),
        (State.PREPARING, -1),
        (State.SHADOWING, -1),
        (State.OBSERVING, 0),
        (State.OBSERVING, 1),
        (State.PROMOTING, 2),
        (State.BAKING, 2),
    ]
    assert w.rollout.state is State.SUCCEEDED
    # Latency bounds are frozen at each step's entry, from what stable did before it.
    assert weights(w.rollout) == [0, 0.05, 0.5, 1]
    assert [e.epoch for e in w.rollout.epochs] == [0, 1, 2, 3]
    assert [e.latency_bounds is None for e in w.rollout.epochs] == [True, False, False, False]
    assert w.rollout.finished_at == w.now
    assert w.rollout.reason == "120 s of bake, no objection".replace("120 s", "2 min")


def test_each_state_says_what_comes_next() -> None:
    w = world(canary_ready=1)
    assert w.next == "Preparing begins at once."
    w.tick()
    assert w.next == (
        "Shadow traffic begins when version 2 is ready: 1 of 2 replicas are; given up in 100 s."
    )
    w.canary_ready = 2
    w.to(State.SHADOWING)
    w.rate = 10
    w.tick(10)
    assert w.next == ("Step 1 (5 %) begins after 100 pairs of answers (20 compared), or in 50 s.")
    w.rate = 200
    w.to(State.OBSERVING)
    assert w.next == "Step 2 (50 %) begins in 60 s if nothing speaks against it."
    w.to(State.OBSERVING, step=1)
    w.tick(30)
    assert w.next == "Version 2 is promoted in 30 s if nothing speaks against it."
    w.to(State.PROMOTING)
    assert w.next == "Bakes as soon as every gateway sends all requests to version 2."
    w.to(State.BAKING).tick(20)
    assert w.next == "Succeeds in 100 s if nothing speaks against it."
    w.to(State.SUCCEEDED)
    assert w.next == "Version 1 is kept for another 5 min; a rollback to it is immediate."
    w.say("rollback")
    assert w.next == (
        "Is rolled back as soon as every gateway sends all requests to version 1 and it is ready."
    )
    w.to(State.ROLLED_BACK)
    assert w.next == (
        "It is over, with all requests at version 1. To try version 2 again: "
        "serving rollout start digits --to 2."
    )


def test_capacity_comes_before_weight() -> None:
    w = world(canary_ready=1).to(State.PREPARING)
    w.tick(50)
    assert w.rollout.state is State.PREPARING
    w.canary_ready = 2
    assert w.tick().state is State.SHADOWING
    assert w.rollout.reason == "all 2 replicas of version 2 are ready"


def test_baking_waits_for_the_last_gateway() -> None:
    w = world().to(State.PROMOTING)
    w.lagging = True
    for _ in range(5):
        assert w.tick().state is State.PROMOTING
    w.lagging = False
    assert w.tick().state is State.BAKING


@pytest.mark.parametrize("name", ["canary", "blue-green", "fast"])
def test_the_plans_that_need_nobody_end_by_themselves(name: str) -> None:
    w = world(default_plan(name))
    while w.rollout.active:
        w.tick(1 if name == "fast" else 60)
    assert w.rollout.state is State.SUCCEEDED
    *rest, last = [0, *(s.weight / 100 for s in w.rollout.spec.steps), 1]
    parts = {"canary": 12, "blue-green": 12, "fast": 1}[name]
    assert weights(w.rollout) == [*rest, *[last] * parts]
    assert [e.part for e in w.rollout.epochs[len(rest) :]] == list(range(parts))


def test_shadow_only_goes_on_copying_until_a_person_decides() -> None:
    w = world(default_plan("shadow-only"), rate=10).to(State.AWAITING_GATE)
    assert (w.rollout.weight, w.rollout.shadow) == (0, 1)
    assert w.next == (
        "Version 2 is promoted when a person approves. "
        "Without it the rollout is rolled back in 24 h."
    )
    w.say("approve")
    assert w.tick().state is State.PROMOTING


def test_shadow_traffic_ends_without_pairs_too() -> None:
    w = world(rate=0).to(State.SHADOWING)
    w.tick(59)
    assert w.tick().state is State.OBSERVING
    assert w.rollout.reason == "60 s of shadow traffic gave 0 pairs of answers"


# What takes a version back.


@pytest.mark.parametrize("stage", [State.OBSERVING, State.AWAITING_GATE, State.PAUSED])
def test_a_failing_version_has_no_weight_in_the_same_tick(stage: State) -> None:
    w = world(gated()).to(State.OBSERVING)
    if stage is State.AWAITING_GATE:
        w.to(stage)
    if stage is State.PAUSED:
        w.say("pause")
    w.canary_fails = 0.5
    w.until(lambda r: r.state is not stage, within=60)
    assert w.rollout.state is State.ROLLING_BACK
    assert w.rollout.weight == w.rollout.current.weight == 0
    failed = next(v for v in w.rollout.verdicts if v.trigger == "errors")
    assert w.rollout.reason == failed.sentence
    assert failed.verdict == "fail"
    verdicts = w.rollout.verdicts
    assert w.tick().state is State.ROLLED_BACK
    # Why it was taken back stays to be explained.
    assert w.rollout.verdicts == verdicts
    assert w.rollout.reason == failed.sentence


@pytest.mark.parametrize("state", [State.SHADOWING, State.PROMOTING, State.BAKING])
def test_triggers_are_obeyed_in_every_state_with_canary_traffic(state: State) -> None:
    w = world()
    w.to(state)
    w.restarts = (w.now - 2, w.now - 1)
    assert w.tick().state is State.ROLLING_BACK
    assert w.rollout.weight == 0
    assert "restarted" in w.rollout.reason


def test_a_version_that_never_becomes_ready_is_rolled_back_before_any_traffic() -> None:
    w = world(canary_ready=1).to(State.PREPARING)
    w.until(lambda r: not r.active, within=101)
    assert w.rollout.state is State.ROLLED_BACK
    assert w.rollout.reason == "1 of 2 replicas of version 2 were ready after 100 s"
    assert weights(w.rollout) == [0]


def test_a_version_that_cannot_start_is_not_waited_for() -> None:
    w = world(canary_ready=0).to(State.PREPARING)
    w.canary_failed = "the golden outputs differ"
    assert w.tick().state is State.ROLLED_BACK
    assert w.rollout.reason == "version 2 cannot start: the golden outputs differ"


def test_a_canary_without_replicas_gets_nothing_and_is_taken_back_if_it_stays_away() -> None:
    w = world().to(State.OBSERVING)
    w.tick(30)
    w.canary_ready = 0
    w.tick()
    assert (w.rollout.state, w.rollout.weight) == (State.OBSERVING, 0)
    assert w.next == (
        "On hold: version 2 has no ready replica. Rolled back in 100 s if version 2 is not back."
    )
    w.tick(50)
    w.canary_ready = 1
    assert w.tick().weight == 0.05
    assert w.next == "Step 2 (50 %) begins in 29 s if nothing speaks against it."
    w.canary_ready = 0
    w.tick()
    assert w.tick(100).state is State.ROLLING_BACK
    assert w.rollout.reason == "version 2 has had no ready replica for 100 s"


def test_a_canary_answers_for_a_lost_stable_and_nothing_is_decided_meanwhile() -> None:
    w = world().to(State.OBSERVING)
    w.tick(30)
    w.stable_ready = 0
    assert w.tick().weight == 1
    assert w.next == (
        "On hold: version 1 has no ready replica. Goes on when it is back, or without it: "
        "serving rollout promote digits."
    )
    w.tick(500)
    assert (w.rollout.state, w.rollout.step) == (State.OBSERVING, 0)
    w.stable_ready = 1
    assert w.tick().weight == 0.05
    assert w.next == "Step 2 (50 %) begins in 29 s if nothing speaks against it."
    assert weights(w.rollout) == [0, 0.05, 1, 0.05]
    assert w.to(State.SUCCEEDED)


def test_no_client_meets_the_canary_before_its_first_step_even_if_stable_is_lost() -> None:
    w = world(stable_ready=0).to(State.SHADOWING)
    w.tick(500)
    assert (w.rollout.state, w.rollout.weight) == (State.SHADOWING, 0)


@pytest.mark.parametrize("state", [State.SHADOWING, State.OBSERVING, State.AWAITING_GATE])
def test_no_clock_runs_out_while_stable_is_away(state: State) -> None:
    w = world(gated(timeout_s=600), rate=0 if state is State.OBSERVING else 200)
    w.to(state)
    w.stable_ready = 0
    w.tick()
    for _ in range(3):
        w.tick(10_000)
        assert w.rollout.state is state


@pytest.mark.parametrize("state", [State.PROMOTING, State.BAKING])
def test_promotion_and_bake_go_on_without_stable(state: State) -> None:
    w = world().to(state)
    w.stable_ready = 0
    w.tick()
    assert w.next.endswith(" Version 1 has no ready replica.")
    assert "On hold" not in w.next
    before = w.now
    w.to(State.SUCCEEDED)
    assert w.now - before == pytest.approx(120, abs=2)
    assert w.rollout.weight == 1


@pytest.mark.parametrize("state", [State.PROMOTING, State.BAKING])
def test_promotion_and_bake_wait_for_a_canary_that_is_away(state: State) -> None:
    w = world().to(state)
    w.tick(60 if state is State.BAKING else 0)
    now = w.rollout.state
    w.canary_ready = 0
    w.tick()
    w.tick(90)
    assert w.rollout.state is now
    w.canary_ready = 2
    w.tick()
    w.to(State.BAKING)
    w.tick(58)
    assert w.rollout.state is State.BAKING


def test_a_bake_does_not_succeed_over_a_verdict_that_is_withheld() -> None:
    w = world().to(State.BAKING)
    w.stable_ready, w.restarts = 0, (w.now - 2, w.now - 1)
    w.tick()
    w.tick(200)
    assert w.rollout.state is State.BAKING
    assert "would be taken back" in w.next
    w.stable_ready = 1
    assert w.tick().state is State.ROLLING_BACK


def test_a_bake_without_requests_takes_nothing_back_while_stable_is_away() -> None:
    rule = InsufficientData(300, "rollback")
    w = world(all_at_once(shadow=None, analysis=analysis(on_insufficient_data=rule)), rate=0)
    w.to(State.BAKING).tick(120)
    w.stable_ready = 0
    w.tick()
    assert w.tick(300).state is State.BAKING
    w.stable_ready = 1
    assert w.tick().state is State.ROLLING_BACK


def test_with_both_arms_away_the_canary_has_no_weight() -> None:
    w = world().to(State.OBSERVING)
    w.stable_ready = w.canary_ready = 0
    assert w.tick().weight == 0


@pytest.mark.parametrize("state", [State.SHADOWING, State.OBSERVING, State.PAUSED, State.BAKING])
def test_a_verdict_waits_until_there_is_a_version_to_go_back_to(state: State) -> None:
    w = world()
    if state is State.PAUSED:
        w.to(State.OBSERVING).say("pause")
    w.to(state)
    w.stable_ready, w.restarts = 0, (w.now - 2, w.now - 1)
    for _ in range(5):
        assert w.tick().state is state, "who answers is not taken away while nobody else can"
        assert w.rollout.weight == (0 if state is State.SHADOWING else 1)
    failed = next(v for v in w.rollout.verdicts if v.verdict == "fail")
    assert w.next == (
        "Version 2 would be taken back, but version 1 has no ready replica. Is taken back when it "
        f"is back, or by an abort: {failed.sentence}."
    )
    w.stable_ready = 1
    assert w.tick().state is State.ROLLING_BACK
    assert (w.rollout.weight, w.rollout.reason) == (0, failed.sentence)


def test_a_silent_provider_takes_nothing_back_either_while_stable_is_away() -> None:
    rule = ProviderErrors(5, "rollback")
    w = world(plan(analysis=analysis(QUEUE, on_provider_error=rule)), providers={"queue": OK})
    w.to(State.OBSERVING)
    w.stable_ready, w.providers = 0, {"queue": SILENT}
    assert (w.tick().state, w.rollout.weight) == (State.OBSERVING, 1)
    assert "queue did not answer 5 times in a row" in w.next
    w.stable_ready = 1
    assert w.tick().state is State.ROLLING_BACK


def test_a_canary_of_which_a_part_cannot_start_is_kept_while_stable_is_away() -> None:
    w = world().to(State.OBSERVING)
    w.stable_ready, w.canary_failed = 0, "the golden outputs differ"
    assert (w.tick().state, w.rollout.weight) == (State.OBSERVING, 1)
    w.stable_ready = 1
    assert w.tick().state is State.ROLLING_BACK


def test_a_person_aborts_while_stable_is_away() -> None:
    w = world().to(State.OBSERVING)
    w.stable_ready = 0
    w.tick()
    w.say("abort")
    assert (w.rollout.state, w.rollout.weight) == (State.ROLLING_BACK, 0)


def test_a_version_that_failed_answers_nothing_even_if_stable_is_lost() -> None:
    w = world().to(State.BAKING)
    w.restarts = (w.now - 2, w.now - 1)
    assert w.tick().state is State.ROLLING_BACK
    w.stable_ready = 0
    assert w.rollout.weight == 0
    for _ in range(99):
        assert w.tick().state is State.ROLLING_BACK
    assert w.tick().state is State.ROLLBACK_FAILED
    assert w.rollout.reason.startswith(
        "version 1 has no ready replica; taken back by controller: crash"
    )
    assert w.next.startswith("Needs a person: version 1 has no ready replica")
    assert w.rollout.active
    w.stable_ready = 1
    assert w.tick().state is State.ROLLED_BACK


def test_a_hanging_gateway_makes_a_rollback_fail() -> None:
    w = world().to(State.OBSERVING)
    w.say("abort")
    w.lagging = True
    w.tick(100)
    assert w.rollout.state is State.ROLLBACK_FAILED
    assert "a gateway still runs revision" in w.rollout.reason
    w.say("rollback", "try again")
    w.lagging = False
    assert w.tick().state is State.ROLLED_BACK


def test_an_abort_before_traffic_needs_no_replica_of_stable() -> None:
    w = world(stable_ready=0).to(State.SHADOWING)
    w.say("abort")
    assert w.tick().state is State.ROLLED_BACK


# Evidence that is missing.


def test_no_data_is_no_success_and_pauses_in_the_end() -> None:
    spec = plan(analysis=analysis(on_insufficient_data=InsufficientData(300, "pause")))
    w = world(spec, rate=1).to(State.OBSERVING)
    w.tick(60)
    assert w.rollout.state is State.OBSERVING
    assert w.next == (
        "Step 2 (50 %) begins once there is evidence: version 2 has answered 3 of the 50 requests "
        "that this step needs. Without it the rollout is paused in 5 min."
    )
    w.rate = 0
    w.tick(299)
    assert w.rollout.state is State.OBSERVING
    assert w.tick().state is State.PAUSED
    assert w.rollout.reason == (
        "evidence was still missing 5 min after the hold: "
        "version 2 has answered 3 of the 50 requests that this step needs"
    )
    assert w.rollout.weight == 0.05
    w.say("resume")
    w.tick(299)
    assert w.rollout.state is State.OBSERVING
    w.rate = 1000
    assert w.tick().step == 1


@pytest.mark.parametrize(
    ("action", "state", "step"),
    [("rollback", State.ROLLING_BACK, 0), ("proceed", State.OBSERVING, 1)],
)
def test_a_plan_may_decide_without_data(action: str, state: State, step: int) -> None:
    rule = InsufficientData(300, action)  # type: ignore[arg-type]
    w = world(plan(analysis=analysis(on_insufficient_data=rule)), rate=0).to(State.OBSERVING)
    w.tick(60)
    w.tick(300)
    assert (w.rollout.state, w.rollout.step) == (state, step)


def test_a_step_may_require_that_triggers_pass() -> None:
    steps = (Step(5, 60, require_pass=("errors",)), Step(50, 60))
    w = world(plan(steps=steps), rate=20).to(State.OBSERVING)
    w.tick(60)
    assert w.rollout.step == 0
    assert w.next.startswith(
        "Step 2 (50 %) begins once there is evidence: the step requires a pass"
    )
    w.rate = 2000
    w.until(lambda r: r.step == 1, within=60)


def test_data_of_an_earlier_step_is_none_of_this_one() -> None:
    w = world().to(State.OBSERVING, step=1)
    w.rate = 0
    w.tick(60)
    assert w.rollout.step == 1
    assert "version 2 has answered 0 of the 50 requests" in w.next


def test_what_the_canary_answered_for_a_lost_stable_is_none_of_a_steps_requests() -> None:
    w = world(rate=1).to(State.OBSERVING)
    w.stable_ready = 0
    w.tick()
    w.tick(500)
    w.stable_ready = 1
    w.tick(60)
    w.tick(60)
    assert (w.rollout.state, w.rollout.step) == (State.OBSERVING, 0)
    assert "version 2 has answered 3 of the 50 requests that this step needs" in w.next


def all_at_once(**changes: object) -> RolloutSpec:
    """PLAN without steps: from the shadow straight to the promotion."""
    return plan(steps=(), **changes)


def test_without_steps_a_shadow_that_compared_next_to_nothing_promotes_nothing() -> None:
    rule = InsufficientData(300, "pause")
    w = world(all_at_once(analysis=analysis(on_insufficient_data=rule)), rate=0)
    w.to(State.SHADOWING).tick(60)
    w.tick(299)
    assert (w.rollout.state, w.rollout.weight) == (State.SHADOWING, 0)
    assert w.next == (
        "Version 2 is promoted once there is evidence: 0 pairs of answers were compared of the 50 "
        "that a promotion without steps needs. Without it the rollout is paused in 1 s."
    )
    assert w.tick().state is State.PAUSED
    assert w.rollout.reason == (
        "evidence was still missing 5 min after the shadow traffic: 0 pairs of answers were "
        "compared of the 50 that a promotion without steps needs"
    )
    w.say("resume")
    w.rate = 1000
    assert w.tick().state is State.PROMOTING


def test_without_steps_some_pairs_are_enough_at_the_end_of_the_shadow() -> None:
    w = world(all_at_once(shadow=replace(PLAN.shadow, min_pairs=2000)), rate=20)
    w.to(State.PROMOTING)
    assert w.rollout.reason == "60 s of shadow traffic gave 240 pairs of answers"


@pytest.mark.parametrize("steps", [(), PLAN.steps])
def test_a_provider_that_never_answered_keeps_the_shadow_back(steps: tuple[Step, ...]) -> None:
    spec = plan(steps=steps, analysis=analysis(QUEUE))
    w = world(spec, providers={"queue": ProviderState("unknown")}).to(State.SHADOWING)
    w.tick(60)
    w.tick(600)
    assert (w.rollout.state, w.rollout.waiting_since) == (State.SHADOWING, w.now - 600)
    assert "once there is evidence: queue: no answer" in w.next
    w.providers = {"queue": SILENT}
    assert w.tick().state is State.PAUSED
    w.say("resume")
    assert w.tick().state is (State.OBSERVING if steps else State.PROMOTING)


def test_a_provider_that_never_answered_keeps_the_bake_back() -> None:
    w = world(plan(analysis=analysis(QUEUE)), providers={"queue": OK}).to(State.BAKING)
    w.providers = {"queue": ProviderState("unknown")}
    w.tick(120)
    w.tick(600)
    assert w.rollout.state is State.BAKING
    assert w.next.startswith("Succeeds once there is evidence: queue: no answer")
    assert due_hooks(w.rollout, w.snapshot()) == ()
    assert w.tick(1200).state is State.PAUSED
    assert w.rollout.weight == 1
    w.say("resume")
    w.providers = {"queue": OK}
    assert w.tick().state is State.SUCCEEDED


def test_a_bake_needs_requests_as_a_step_does() -> None:
    w = world(all_at_once(shadow=None), rate=0).to(State.BAKING)
    w.tick(120)
    assert w.rollout.state is State.BAKING
    assert w.next == (
        "Succeeds once there is evidence: version 2 has answered 0 of the 50 requests that a "
        "rollout needs. Without it the rollout is paused in 30 min."
    )
    w.rate = 10
    w.tick(4)
    assert "has answered 40 of the 50" in w.next
    assert w.tick().state is State.SUCCEEDED


def test_requests_of_the_steps_count_for_the_bake() -> None:
    w = world().to(State.BAKING)
    w.rate = 0
    assert w.tick(120).state is State.SUCCEEDED


def test_who_resumes_a_bake_that_is_over_goes_on_without_requests() -> None:
    w = world(all_at_once(shadow=None), rate=0).to(State.BAKING)
    w.tick(60)
    w.say("pause")
    w.say("resume")
    w.tick(60)
    w.tick(1799)
    assert w.rollout.state is State.BAKING, "that pause was not for want of requests"
    assert w.tick().state is State.PAUSED
    assert w.next.endswith("Goes on with its bake when resumed.")
    w.say("resume", "nobody uses it at night")
    assert stored(w.tick()).state is State.SUCCEEDED


@pytest.mark.parametrize(
    ("action", "state"), [("rollback", State.ROLLING_BACK), ("proceed", State.SUCCEEDED)]
)
def test_a_plan_says_what_a_bake_without_requests_comes_to(action: str, state: State) -> None:
    rule = InsufficientData(300, action)  # type: ignore[arg-type]
    w = world(all_at_once(shadow=None, analysis=analysis(on_insufficient_data=rule)), rate=0)
    w.to(State.BAKING).tick(120)
    assert w.tick(300).state is state


# Pauses.


def test_a_pausing_trigger_pauses_and_a_resume_goes_past_it() -> None:
    w = world(plan(analysis=analysis(QUEUE)), providers={"queue": OK}).to(State.OBSERVING)
    w.tick(30)
    w.providers = {"queue": BAD}
    assert w.tick().state is State.PAUSED
    assert (w.rollout.weight, w.rollout.epoch) == (0.05, 1)
    assert "queue: answered bad" in w.rollout.reason
    assert "value 7" in w.rollout.reason
    assert w.next.startswith("Paused (queue: answered bad")
    assert w.next.endswith("Goes on with its step when resumed.")
    w.tick(1000)
    w.say("resume", "known")
    assert (w.rollout.actor, w.rollout.reason) == ("grace", "known")
    # The pause was no part of the hold.
    assert w.next == "Step 2 (50 %) begins in 29 s if nothing speaks against it."
    w.tick()
    assert w.rollout.state is State.OBSERVING
    w.until(lambda r: r.step == 1, within=60)
    # It got well and fails again: that is news.
    w.providers = {"queue": OK}
    w.tick()
    w.providers = {"queue": BAD}
    assert w.tick().state is State.PAUSED


@pytest.mark.parametrize(
    "state",
    [State.PENDING, State.PREPARING, State.SHADOWING, State.OBSERVING, State.BAKING],
)
def test_a_person_pauses_in_every_state_that_can_wait(state: State) -> None:
    w = world().to(state)
    w.say("pause", "lunch")
    w.tick(10_000)
    assert (w.rollout.state, w.rollout.stage) == (State.PAUSED, state)
    w.say("resume")
    assert w.rollout.state is state


LONG = plan(steps=(Step(5, 200), Step(50, 60)))


def test_an_arm_that_goes_in_a_pause_and_comes_back_after_it_is_not_taken_off_twice() -> None:
    w = world(LONG).to(State.OBSERVING)
    w.tick(100)
    w.say("pause")
    w.stable_ready = 0
    w.tick(10)
    w.tick(30_000)
    w.say("resume")
    w.tick(2)
    w.stable_ready = 2
    w.tick()
    assert w.next == "Step 2 (50 %) begins in 100 s if nothing speaks against it."


def test_an_arm_that_comes_back_in_a_pause_was_away_before_it() -> None:
    w = world(LONG).to(State.OBSERVING)
    w.tick(100)
    w.stable_ready = 0
    w.tick()
    w.tick(50)
    w.say("pause")
    w.tick(10)
    w.stable_ready = 2
    w.tick(10)
    w.say("resume")
    assert w.next == "Step 2 (50 %) begins in 99 s if nothing speaks against it."


def test_both_arms_away_at_once_are_away_once() -> None:
    w = world(LONG).to(State.OBSERVING)
    w.tick(100)
    w.stable_ready = 0
    w.tick()
    w.canary_ready = 0
    w.tick(30)
    w.tick(30)
    w.stable_ready = 2
    w.tick(10)
    w.canary_ready = 2
    w.tick(10)
    assert w.next == "Step 2 (50 %) begins in 99 s if nothing speaks against it."
    w.to(State.OBSERVING, step=1)


def test_what_stopped_the_clocks_of_a_step_is_no_matter_of_the_bake() -> None:
    w = world(LONG).to(State.OBSERVING)
    w.stable_ready = 0
    w.tick(100)
    w.say("promote")
    w.to(State.BAKING)
    w.stable_ready = 2
    w.tick(20)
    assert w.next == "Succeeds in 100 s if nothing speaks against it."


def test_a_bake_does_not_go_on_while_it_is_paused() -> None:
    w = world().to(State.BAKING)
    w.tick(100)
    w.say("pause")
    w.tick(1000)
    w.say("resume")
    assert w.next == "Succeeds in 20 s if nothing speaks against it."


def test_a_silent_provider_pauses_but_neither_fails_nor_passes() -> None:
    w = world(plan(analysis=analysis(QUEUE)), providers={"queue": OK}).to(State.OBSERVING)
    w.providers = {"queue": ProviderState("unknown", errors=4)}
    w.tick(60)
    assert w.rollout.step == 0
    assert w.next.startswith("Step 2 (50 %) begins once there is evidence: queue: no answer")
    w.providers = {"queue": SILENT}
    assert w.tick().state is State.PAUSED
    assert w.rollout.reason == "queue did not answer 5 times in a row: connection refused"
    w.say("resume")
    assert w.tick().step == 1  # a person took it upon themselves
    w.providers = {"queue": BAD}
    assert w.tick().state is State.PAUSED  # an answer, and a bad one


def test_a_silent_provider_may_take_a_version_back() -> None:
    rule = ProviderErrors(5, "rollback")
    w = world(plan(analysis=analysis(QUEUE, on_provider_error=rule)), providers={"queue": OK})
    w.to(State.OBSERVING)
    w.providers = {"queue": SILENT}
    assert w.tick().state is State.ROLLING_BACK


# Gates.


def test_a_gate_waits_for_a_person() -> None:
    w = world(gated(timeout_s=600)).to(State.AWAITING_GATE)
    assert w.rollout.reason == "step 1 (5 %) held for 60 s, no objection; the gate decides"
    assert w.next == (
        "Step 2 (50 %) begins when a person approves. Without it the rollout is paused in 10 min."
    )
    w.tick(500)
    w.say("approve", "looks good")
    assert w.rollout.state is State.AWAITING_GATE
    with pytest.raises(ConflictError, match="the gate of step 1 was approved by grace"):
        w.say("approve")
    assert w.next == "Step 2 (50 %) begins at once."
    w.tick()
    assert (w.rollout.state, w.rollout.step) == (State.OBSERVING, 1)
    assert w.rollout.reason == "grace approved: looks good"
    assert [(a.step, a.actor, a.reason) for a in w.rollout.approvals] == [
        (0, "grace", "looks good")
    ]


def test_a_gate_that_nobody_passes_pauses_and_can_be_approved_then() -> None:
    w = world(gated(timeout_s=600)).to(State.AWAITING_GATE)
    w.tick(600)
    assert w.rollout.state is State.PAUSED
    assert w.rollout.reason == "nobody passed the gate of step 1 within 10 min"
    assert w.next.endswith("Goes on with its gate when resumed; approve passes it too.")
    w.say("approve")
    assert w.rollout.state is State.AWAITING_GATE
    assert w.tick().step == 1


def test_a_resumed_gate_waits_its_whole_time_again() -> None:
    w = world(gated(timeout_s=600)).to(State.AWAITING_GATE)
    w.tick(600)
    w.say("resume")
    w.tick(599)
    assert w.rollout.state is State.AWAITING_GATE


@pytest.mark.parametrize(
    ("action", "state"), [("rollback", State.ROLLING_BACK), ("proceed", State.OBSERVING)]
)
def test_what_a_gates_timeout_does(action: str, state: State) -> None:
    w = world(gated(timeout_s=600, on_timeout=action)).to(State.AWAITING_GATE)
    w.tick(600)
    assert (w.rollout.state, w.rollout.step) == (state, action == "proceed")


def test_a_webhook_gate_asks_until_it_says_yes() -> None:
    w = world(gated(type="webhook", url="http://gate", timeout_s=600)).to(State.AWAITING_GATE)
    (hook,) = due_hooks(w.rollout, w.snapshot())
    assert (hook.key, hook.url) == ("gate:0", "http://gate")
    w.providers = {hook.key: SILENT}
    assert w.tick(100).state is State.AWAITING_GATE
    assert "when http://gate says yes (so far: connection refused)." in w.next
    w.providers = {hook.key: OK}
    assert w.tick().step == 1
    assert w.rollout.reason == "the gate's webhook said yes"


def test_a_webhook_gate_that_was_silent_too_long_says_what_it_answered() -> None:
    w = world(gated(type="webhook", url="http://gate", timeout_s=60)).to(State.AWAITING_GATE)
    w.providers = {"gate:0": SILENT}
    assert w.tick(60).state is State.PAUSED
    assert w.rollout.reason == (
        "nobody passed the gate of step 1 within 60 s (so far: connection refused)"
    )


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_webhook_gate_that_says_no_takes_the_version_back_at_once(dry_run: bool) -> None:
    spec = gated(type="webhook", url="http://gate/secret", timeout_s=600, on_timeout="proceed")
    w = world(replace(spec, analysis=replace(spec.analysis, dry_run=dry_run)))
    w.to(State.AWAITING_GATE)
    assert "when http://gate says yes." in w.next
    w.providers = {"gate:0": ProviderState("fail", fails=1, message="http://gate says fail: slow")}
    assert w.tick().state is State.ROLLING_BACK
    assert w.rollout.reason == "the gate of step 1 refused: http://gate says fail: slow"
    assert w.rollout.weight == 0


def test_a_person_overrules_a_gate_that_says_no_only_beforehand() -> None:
    w = world(gated(type="webhook", url="http://gate", timeout_s=600)).to(State.AWAITING_GATE)
    w.say("approve", "I know better")
    w.providers = {"gate:0": BAD}
    assert w.tick().step == 1
    with pytest.raises(ConflictError, match="'approve' is not possible"):
        w.say("approve")


# Webhooks before the rollout and before steps.


def hooked() -> RolloutSpec:
    return plan(webhooks=(Webhook("pre-rollout", "http://a"), Webhook("pre-step", "http://b")))


HOOK_KEYS = ("pre-rollout:0:0", "pre-step:0:0", "pre-step:1:0", "pre-step:2:0")


def test_webhooks_are_asked_when_their_time_has_come() -> None:
    w = world(hooked())
    asked = []
    while w.rollout.active:
        for hook in due_hooks(w.rollout, w.snapshot()):
            before = w.rollout
            assert w.tick().state is before.state
            assert w.next.endswith(f" when the {hook.key[:-4]} webhook at {hook.url} says yes.")
            asked.append(hook.key)
            w.providers = {**w.providers, hook.key: OK}
        w.tick()
    assert w.rollout.state is State.SUCCEEDED
    assert asked == ["pre-rollout:0:0", "pre-step:0:0", "pre-step:1:0", "pre-step:2:0"]


def test_without_a_shadow_the_first_step_still_waits_for_its_webhook_and_says_so() -> None:
    w = world(plan(shadow=None, webhooks=(Webhook("pre-step", "http://b"),))).to(State.SHADOWING)
    assert w.tick(30).state is State.SHADOWING
    assert w.next == "Step 1 (5 %) begins when the pre-step webhook at http://b says yes."


PROCEEDING = {
    "gate": {"steps": (Step(5, 60, gate=Gate(on_timeout="proceed", timeout_s=100)), Step(50, 60))},
    "evidence": {
        "steps": (Step(5, 60), Step(50, 60)),
        "analysis": analysis(on_insufficient_data=InsufficientData(100, "proceed")),
    },
}


@pytest.mark.parametrize("missing", PROCEEDING)
def test_a_plan_that_proceeds_asks_the_webhooks_first(missing: str) -> None:
    spec = plan(webhooks=(Webhook("pre-step", "http://b"),), shadow=None, **PROCEEDING[missing])
    w = world(spec, providers={"pre-step:0:0": OK}, rate=200 if missing == "gate" else 0)
    w.to(State.OBSERVING)
    began, asked = w.now, lambda: [h.key for h in due_hooks(w.rollout, w.snapshot())]
    w.until(lambda _: "pre-step:1:0" in asked(), within=400)
    assert w.now - began == pytest.approx(160, abs=2), "the hold, and what was waited for"
    for _ in range(200):
        w.tick()
        assert asked() == ["pre-step:1:0"], "until it has answered"
        assert w.next == "Step 2 (50 %) begins when the pre-step webhook at http://b says yes."
    assert w.rollout.step == 0
    w.providers["pre-step:1:0"] = OK
    w.tick()
    assert (w.rollout.state, w.rollout.step) == (State.OBSERVING, 1)
    assert "the plan says to proceed" in w.rollout.reason


def test_webhooks_that_refuse_take_the_version_back() -> None:
    no = ProviderState("fail", fails=2, message="http://a says fail: red")
    w = world(hooked(), providers={"pre-rollout:0:0": no})
    assert w.tick().state is State.PENDING
    assert w.next == (
        "Preparing begins when the pre-rollout webhook at http://a says yes "
        "(so far: http://a says fail: red)."
    )
    w.providers = {"pre-rollout:0:0": replace(no, fails=3)}
    assert w.tick().state is State.ROLLED_BACK
    assert w.rollout.reason == (
        "the pre-rollout webhook at http://a refused 3 times in a row: http://a says fail: red"
    )
    w = world(hooked(), providers={"pre-rollout:0:0": OK, "pre-step:0:0": BAD})
    w.until(State.ROLLING_BACK)
    assert set(weights(w.rollout)) == {0}


# Commands.


def test_promote_skips_the_steps_that_are_left() -> None:
    w = world().to(State.OBSERVING)
    w.say("promote")
    assert (w.rollout.state, w.rollout.weight, w.rollout.current.weight) == (State.PROMOTING, 1, 1)
    w.to(State.SUCCEEDED)


def test_a_canary_without_replicas_is_not_promoted() -> None:
    w = world().to(State.OBSERVING)
    w.canary_ready = 0
    w.tick()
    with pytest.raises(ConflictError, match="version 2 has no ready replica now"):
        w.say("promote")


def test_another_target_supersedes() -> None:
    w = world().to(State.OBSERVING)
    w.say("superseded", "version 3 was applied")
    assert (w.rollout.state, w.rollout.weight) == (State.ROLLING_BACK, 0)
    assert w.tick().state is State.ROLLED_BACK
    assert w.rollout.reason == "version 3 was applied"


def test_rollback_after_success_as_long_as_the_old_version_is_kept() -> None:
    w = world().to(State.SUCCEEDED)
    assert w.rollout.warm_until == w.now + PLAN.keep_previous_s
    with pytest.raises(ConflictError, match="'abort' is not possible; possible now: rollback"):
        w.say("abort")
    w.tick(299)
    w.say("rollback", "complaints")
    assert (w.rollout.state, w.rollout.weight, w.rollout.finished_at) == (
        State.ROLLING_BACK,
        0,
        None,
    )
    assert w.tick().state is State.ROLLED_BACK
    assert w.rollout.reason == "complaints"


def test_rollback_after_the_old_version_is_gone_is_refused() -> None:
    w = world().to(State.SUCCEEDED)
    w.now += 300
    with pytest.raises(ConflictError, match="version 1 is no longer kept; to go back to it: "):
        w.say("rollback")
    assert w.tick().warm_until is None
    assert w.next == (
        "It has succeeded, and version 1 is no longer kept. To go back to it: "
        "serving rollout start digits --to 1."
    )


# Trials.


def test_a_dry_run_records_verdicts_and_acts_on_none() -> None:
    spec = plan(analysis=analysis(QUEUE, dry_run=True))
    w = world(spec, canary_fails=0.5, providers={"queue": BAD}).to(State.OBSERVING, step=1)
    outcomes = {v.trigger: v.verdict.value for v in w.rollout.verdicts}
    assert (outcomes["errors"], outcomes["queue"]) == ("fail", "fail")
    w.to(State.SUCCEEDED)


def test_a_dry_run_still_needs_replicas() -> None:
    w = world(plan(analysis=analysis(dry_run=True))).to(State.OBSERVING)
    w.canary_ready = 0
    w.tick()
    assert w.tick(100).state is State.ROLLING_BACK


def test_latency_is_judged_as_soon_as_stable_has_answered_enough() -> None:
    w = world(plan(shadow=None), rate=10).to(State.OBSERVING)
    w.tick(30)
    assert w.rollout.current.latency_bounds is None
    assert latency_sentence(w) == "latency: waits for 400 answers of stable to judge by, 295 so far"
    w.until(lambda r: r.current.latency_bounds is not None, within=20)
    assert (w.rollout.step, weights(w.rollout)) == (0, [0, 0.05, 0.05])


def latency_sentence(w: World) -> str:
    return next(v.sentence for v in w.rollout.verdicts if v.trigger == "latency")


def test_latency_bounds_follow_a_stable_that_becomes_slower_within_a_step() -> None:
    w = world(plan(steps=(Step(5, 600), Step(50, 60)))).to(State.OBSERVING)
    frozen = w.rollout.current.latency_bounds
    w.tick(60)
    # More load: both arms take half as long again, stable's median is past the body's bound.
    w.latency_bucket += 6
    w.until(lambda r: r.current.latency_bounds != frozen, within=200)
    assert w.rollout.step == 0
    w.tick(60)
    bounds = w.rollout.current.latency_bounds
    assert bounds is not None
    assert frozen is not None
    assert w.latency_bucket <= bounds[1] <= w.latency_bucket + 4
    # Counts of before keep their bounds: they belong to their own epoch.
    assert next(e.latency_bounds for e in w.rollout.epochs if e.step == 0) == frozen
    # And a canary that is half as slow again is found in the same step.
    w.canary_slower = 6
    w.to(State.ROLLING_BACK)
    assert w.rollout.step == 0
    assert w.rollout.reason.startswith("latency: longer than")


def test_a_stable_whose_latency_goes_up_and_down_makes_few_epochs() -> None:
    w = world(plan(steps=(Step(5, 100_000), Step(50, 60)))).to(State.OBSERVING)
    for minute in range(600):
        w.latency_bucket = 60 + 8 * (minute % 2)
        w.tick(60)
    assert w.rollout.state is State.OBSERVING
    assert len(w.rollout.epochs) < 16


def test_restarts_are_remembered_by_the_rollout() -> None:
    w = world().to(State.OBSERVING)
    w.restarts = (w.now - 1,)
    w.tick()
    w.restarts = ()  # a controller that has just started saw none
    w.tick()
    w.restarts = (w.now,)
    assert w.tick().state is State.ROLLING_BACK


def test_a_clock_that_goes_back_ends_nothing_early() -> None:
    w = world().to(State.OBSERVING)
    w.now = START - 10_000
    assert w.tick().step == 0


def test_a_plan_without_triggers_goes_by_time_alone() -> None:
    spec = plan(analysis=analysis().__class__(triggers=()), bake=Bake(10))
    w = World(rollout=world(spec).rollout, rate=0)
    w.to(State.SUCCEEDED)
    assert w.now - START < 250


def test_a_controller_that_comes_back_at_any_tick_goes_on_the_same() -> None:
    spec = plan(steps=(Step(5, 30, gate=Gate(on_timeout="proceed", timeout_s=10)), Step(50, 30)))
    w, states = world(spec, canary_ready=0), set()
    while w.rollout.active:
        before, w.canary_ready = w.rollout, 2 * (w.rollout.state is not State.PENDING)
        w.tick(3)
        assert decide(stored(before), w.snapshot()) == w.rollout
        states.add(before.state)
    assert states == {*PAUSABLE, State.PROMOTING}
    assert w.rollout.state is State.SUCCEEDED


def test_who_promotes_past_a_pause_is_not_paused_by_it_again() -> None:
    headroom = default_trigger("gpu_memory_headroom")
    w = world(plan(analysis=analysis(headroom))).to(State.OBSERVING)
    w.gpus = (CanaryGpu("a", "GPU-1", free=0.01, of="its lease"),)
    assert w.tick().state is State.PAUSED
    assert w.say("promote").state is State.PROMOTING
    w.until(State.BAKING)
    w.tick(5)
    assert w.rollout.state is State.BAKING
    # After it has been well in between, it is another failure.
    w.gpus = ()
    w.tick()
    w.gpus = (CanaryGpu("a", "GPU-1", free=0.01, of="its lease"),)
    assert w.tick().state is State.PAUSED


# Time in which nobody looked.


def missed(w: World, seconds: float) -> None:
    """So long nobody looked; what gateways counted is not known yet."""
    w.now += seconds
    w.rollout = left_out(w.rollout, unwatched_s(w.rollout, w.now - seconds, w.now))


@pytest.mark.parametrize(("seconds", "left"), [(5, 25), (1000, 25), (-1000, 30)])
def test_of_a_time_in_which_nobody_looked_a_few_ticks_count(seconds: float, left: float) -> None:
    w = world().to(State.OBSERVING)
    w.tick(30)
    missed(w, seconds)
    assert w.next == f"Step 2 (50 %) begins in {left} s if nothing speaks against it."


def test_no_wait_runs_out_while_nobody_looks() -> None:
    w = world(rate=0).to(State.OBSERVING)
    w.tick(60)
    missed(w, 10_000)
    w.canary_ready = 0
    assert w.tick().state is State.OBSERVING
    missed(w, 10_000)
    assert w.tick().state is State.OBSERVING, "since when it lacks evidence, and a replica"
    w.canary_ready = 2
    w.tick()
    assert "is paused in 30 min" in w.next
    w.say("pause")
    w.tick(20)
    missed(w, 10_000)
    w.say("resume")
    assert w.rollout.step_entered_at == pytest.approx(w.now - 65, abs=5)


def test_after_it_nothing_goes_on_by_old_counts_but_what_fails_is_taken_back() -> None:
    w = world(hooked(), providers=dict.fromkeys(HOOK_KEYS, OK)).to(State.OBSERVING)
    w.tick(59)
    w.now += 10
    stale = replace(w.snapshot(), current=False)
    w.rollout = decide(w.rollout, stale)
    assert (w.rollout.state, w.rollout.step) == (State.OBSERVING, 0)
    assert next_sentence(w.rollout, stale) == (
        "Step 2 (50 %) begins when gateways have said what they counted meanwhile."
    )
    failing = replace(stale, restarts=(w.now - 2, w.now - 1))
    assert decide(w.rollout, failing).state is State.ROLLING_BACK
    assert decide(w.rollout, w.snapshot()).step == 1
    late = world(canary_ready=0).to(State.PREPARING)
    late.now += 200
    stale = replace(late.snapshot(), current=False)
    assert decide(late.rollout, stale).state is State.PREPARING
    assert decide(late.rollout, late.snapshot()).state is State.ROLLED_BACK
