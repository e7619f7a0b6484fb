"""The states of a rollout and the table of every legal move between them.

    pending → preparing → shadowing → observing ⇄ awaiting_gate → promoting → baking → succeeded

A step of the plan is one round of observing (and awaiting_gate). From shadowing to baking anything
that takes the version back leads to rolling_back → rolled_back; before that there is no traffic to
take away and the rollout ends at once, paused or not. `docs/rollouts.md` draws this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where a rollout is."""

    PENDING = "pending"
    PREPARING = "preparing"
    SHADOWING = "shadowing"
    OBSERVING = "observing"
    AWAITING_GATE = "awaiting_gate"
    PAUSED = "paused"
    PROMOTING = "promoting"
    BAKING = "baking"
    SUCCEEDED = "succeeded"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    ROLLBACK_FAILED = "rollback_failed"


class Event(StrEnum):
    """What can happen to a rollout: found by a tick, or asked for by a person."""

    START = "start"
    READY = "ready"
    NOT_READY = "not_ready"
    SHADOW_DONE = "shadow_done"
    STEP_DONE = "step_done"
    GATE_NEEDED = "gate_needed"
    GATE_PASSED = "gate_passed"
    PROMOTED = "promoted"
    BAKE_DONE = "bake_done"
    FAIL = "fail"
    DRAINED = "drained"
    STUCK = "stuck"
    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    APPROVE = "approve"
    ABORT = "abort"
    ROLLBACK = "rollback"
    SUPERSEDED = "superseded"


EVENT_MEANING: Final[Mapping[Event, str]] = {
    Event.START: "the webhooks before the rollout agree, or there are none",
    Event.READY: "as many replicas of the new version as wanted are ready",
    Event.NOT_READY: "the new version cannot start, or had no ready replica for too long",
    Event.SHADOW_DONE: "enough pairs, or the shadow's time is over, and providers answer",
    Event.STEP_DONE: "the step's hold is over and its evidence is there",
    Event.GATE_NEEDED: "likewise, and the step has a gate",
    Event.GATE_PASSED: "the gate said yes and another step follows",
    Event.PROMOTE: "no step is left, or a person skips the rest",
    Event.PROMOTED: "every gateway runs the table with the new version at full weight",
    Event.BAKE_DONE: "the bake is over and its evidence is there",
    Event.FAIL: "a trigger that rolls back fired",
    Event.DRAINED: "every gateway runs the table without the new version",
    Event.STUCK: "a gateway, or the old version, did not come back in time",
    Event.PAUSE: "a person, a trigger that pauses, or a timeout",
    Event.RESUME: "a person",
    Event.APPROVE: "a person passes the gate whose timeout paused the rollout",
    Event.ABORT: "a person stops the rollout",
    Event.ROLLBACK: "a person wants the old version back",
    Event.SUPERSEDED: "another target was applied",
}

TERMINAL: Final = frozenset({State.SUCCEEDED, State.ROLLED_BACK})
PAUSABLE: Final = (
    State.PENDING,
    State.PREPARING,
    State.SHADOWING,
    State.OBSERVING,
    State.AWAITING_GATE,
    State.BAKING,
)
"""From where a rollout can be paused, and so where a resume leads back to."""

ALONE: Final = frozenset({State.PROMOTING, State.BAKING})
"""Where the new version answers everybody by plan: nothing there waits for the old one."""

_UNSEEN: Final = (State.PENDING, State.PREPARING)
_SEEN: Final = (
    State.SHADOWING,
    State.OBSERVING,
    State.AWAITING_GATE,
    State.PAUSED,
    State.PROMOTING,
    State.BAKING,
)
_TAKEN_BACK_BY: Final = (
    Event.FAIL,
    Event.NOT_READY,
    Event.ABORT,
    Event.ROLLBACK,
    Event.SUPERSEDED,
)
_BY_OTHERS: Final = (Event.ABORT, Event.ROLLBACK, Event.SUPERSEDED)
"""What takes a rollout back that is paused before its version had traffic: nothing is judged."""

TRANSITIONS: Final[Mapping[tuple[State, Event], State | None]] = {
    (State.PENDING, Event.START): State.PREPARING,
    (State.PREPARING, Event.READY): State.SHADOWING,
    (State.SHADOWING, Event.SHADOW_DONE): State.OBSERVING,
    (State.OBSERVING, Event.STEP_DONE): State.OBSERVING,
    (State.OBSERVING, Event.GATE_NEEDED): State.AWAITING_GATE,
    (State.AWAITING_GATE, Event.GATE_PASSED): State.OBSERVING,
    **{
        (state, Event.PROMOTE): State.PROMOTING
        for state in (State.SHADOWING, State.OBSERVING, State.AWAITING_GATE, State.PAUSED)
    },
    (State.PROMOTING, Event.PROMOTED): State.BAKING,
    (State.BAKING, Event.BAKE_DONE): State.SUCCEEDED,
    **{(state, Event.PAUSE): State.PAUSED for state in PAUSABLE},
    (State.PAUSED, Event.RESUME): None,
    (State.PAUSED, Event.APPROVE): None,
    **{(state, event): State.ROLLED_BACK for state in _UNSEEN for event in _TAKEN_BACK_BY},
    **{(state, event): State.ROLLING_BACK for state in _SEEN for event in _TAKEN_BACK_BY},
    (State.SUCCEEDED, Event.ROLLBACK): State.ROLLING_BACK,
    (State.ROLLING_BACK, Event.DRAINED): State.ROLLED_BACK,
    (State.ROLLING_BACK, Event.STUCK): State.ROLLBACK_FAILED,
    (State.ROLLBACK_FAILED, Event.DRAINED): State.ROLLED_BACK,
    (State.ROLLBACK_FAILED, Event.ROLLBACK): State.ROLLING_BACK,
}
"""Every legal move; what is not here changes nothing. None: back to where it was paused.

`target_of` reads it: a paused rollout may end at once, too.
"""


def target_of(state: State, event: Event, stage: State) -> State:
    """Where a legal event leads; `stage` is the state, or the one that was paused.

    A paused rollout is taken back as its stage would be: before there was traffic, at once.
    """
    if event in _TAKEN_BACK_BY and stage in _UNSEEN:
        return State.ROLLED_BACK
    return TRANSITIONS[state, event] or stage


def mermaid() -> str:
    """The table as a Mermaid state diagram: one arrow a pair of states, events in table order."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for (state, event), target in TRANSITIONS.items():
        for end in _ends(state, event, target):
            arrows.setdefault((state, end), []).append(event.value)
    lines = ["stateDiagram-v2", f"    [*] --> {State.PENDING}"]
    lines += [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    lines += [f"    {state} --> [*]" for state in State if state in TERMINAL]
    return "\n".join(lines)


def _ends(state: State, event: Event, target: State | None) -> tuple[State, ...]:
    """Every state that an arrow leads to: of a paused rollout it may depend on its stage."""
    if target is None:
        return _resumed_by(event)
    if state is State.PAUSED and event in _BY_OTHERS:
        return target, State.ROLLED_BACK
    return (target,)


def _resumed_by(event: Event) -> tuple[State, ...]:
    return (State.AWAITING_GATE,) if event is Event.APPROVE else PAUSABLE
