"""The table: every pair of a state and an event is legal as it says, or changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serving.core.rollout import COMMANDS, Rollout, command, transition
from serving.core.rollout_states import (
    EVENT_MEANING,
    PAUSABLE,
    TERMINAL,
    TRANSITIONS,
    Event,
    State,
    mermaid,
)
from serving.errors import ConflictError
from tests.core.rollouts import PLAN, START, start, stored

PAIRS = [(state, event) for state in State for event in Event]


def in_state(state: State) -> Rollout:
    step = {State.OBSERVING: 0, State.AWAITING_GATE: 0, State.PAUSED: 0}.get(state, -1)
    resume_to = State.AWAITING_GATE if state is State.PAUSED else None
    rollout = replace(start(), state=state, resume_to=resume_to, step=step)
    weighted = replace(rollout.current, step=step, weight=rollout.weight)
    warm_until = START + 100 if state is State.SUCCEEDED else None
    return replace(rollout, epochs=(weighted,), warm_until=warm_until)


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_a_pair_leads_where_the_table_says_or_is_refused(state: State, event: Event) -> None:
    rollout = in_state(state)
    if (state, event) not in TRANSITIONS:
        with pytest.raises(ConflictError) as refused:
            transition(rollout, event, now=START + 1, reason="why")
        words = state.value.replace("_", " ")
        assert f"digits from version 1 to 2 is {words}: {event.value!r} is not" in str(
            refused.value
        )
        return
    after = transition(rollout, event, now=START + 1, reason="why", actor="ada")
    assert after.state is (TRANSITIONS[state, event] or State.AWAITING_GATE)
    assert (after.reason, after.actor, after.entered_at) == ("why", "ada", START + 1)
    assert (after.finished_at is not None) == (after.state in TERMINAL)
    assert after.current.weight == after.weight
    assert after.current.step == after.step


@pytest.mark.parametrize("state", State)
def test_a_rollout_comes_back_from_the_store_as_it_was(state: State) -> None:
    assert stored(in_state(state)) == in_state(state)


def test_a_row_of_an_earlier_version_has_only_the_time_that_moves() -> None:
    earlier = in_state(State.BAKING).to_dict()
    del earlier["changed_at"]
    assert Rollout.from_dict(earlier).changed_at == START


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_refused_command_names_those_that_are_possible(state: State, name: str) -> None:
    rollout = in_state(state)
    try:
        command(rollout, name, "ada", "why", START + 1)
    except ConflictError as refused:
        possible = str(refused).partition("possible now: ")[2].split(", ")
        assert name not in possible
        for other in possible if possible != ["nothing"] else []:
            command(rollout, other, "ada", "why", START + 1)


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConflictError, match="no command 'stop'; allowed: pause, resume"):
        command(start(), "stop", "ada", "why", START)


def test_every_state_that_is_not_an_end_has_a_way_out() -> None:
    ways = {state for state, _ in TRANSITIONS}
    assert set(State) - ways == {State.ROLLED_BACK}
    assert {target for target in TRANSITIONS.values() if target} == set(State) - {State.PENDING}


def test_a_pause_leads_back_to_where_it_was() -> None:
    for state in PAUSABLE:
        paused = transition(in_state(state), Event.PAUSE, now=START + 5, reason="wait")
        assert paused.stage is state
        assert paused.weight == in_state(state).weight
        resumed = transition(paused, Event.RESUME, now=START + 9, reason="go")
        assert (resumed.state, resumed.resume_to) == (state, None)


@pytest.mark.parametrize("event", [Event.ABORT, Event.ROLLBACK, Event.SUPERSEDED])
@pytest.mark.parametrize("stage", PAUSABLE)
def test_a_paused_rollout_is_taken_back_as_it_would_be_unpaused(stage: State, event: Event) -> None:
    paused = transition(in_state(stage), Event.PAUSE, now=START + 5, reason="wait")
    unpaused = transition(in_state(stage), event, now=START + 9, reason="no")
    after = transition(paused, event, now=START + 9, reason="no")
    assert (after.state, after.finished_at) == (unpaused.state, unpaused.finished_at)


@pytest.mark.parametrize("stage", [State.PENDING, State.PREPARING, State.BAKING])
def test_a_paused_rollout_is_not_promoted_before_it_is_ready_nor_twice(stage: State) -> None:
    paused = transition(in_state(stage), Event.PAUSE, now=START, reason="wait")
    with pytest.raises(ConflictError, match="'promote' is not possible; possible now: resume,"):
        command(paused, "promote", "ada", "now", START + 1)


def test_the_diagram_shows_every_move() -> None:
    arrows = [line.strip() for line in mermaid().splitlines() if ": " in line]
    drawn = {
        (a, b, event)
        for arrow in arrows
        for a, b, events in [arrow.replace(" --> ", ": ").split(": ")]
        for event in events.split(", ")
    }
    for (state, event), target in TRANSITIONS.items():
        assert target is None or (state, target, event) in drawn
    assert len({(a, e) for a, _, e in drawn}) == len(TRANSITIONS)
    assert set(EVENT_MEANING) == set(Event)


def test_weights_come_from_the_plan() -> None:
    assert [in_state(s).weight for s in (State.PREPARING, State.SHADOWING)] == [0, 0]
    assert in_state(State.OBSERVING).weight == PLAN.steps[0].weight / 100
    assert in_state(State.PAUSED).weight == PLAN.steps[0].weight / 100
    assert {in_state(s).weight for s in (State.PROMOTING, State.BAKING, State.SUCCEEDED)} == {1.0}
    back = (State.ROLLING_BACK, State.ROLLED_BACK, State.ROLLBACK_FAILED)
    assert {in_state(s).weight for s in back} == {0.0}
