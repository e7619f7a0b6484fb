"""What happens to a rollout next, and when, as one sentence for a person."""

from __future__ import annotations

from typing import Final

from serving.core.rollout_danger import stopped_by, withheld
from serving.core.rollout_hooks import gate_key, so_far
from serving.core.rollout_progress import (
    find_event,
    gate_passed,
    missing_evidence,
    pairs_compared,
    proceeds,
    time_over,
)
from serving.core.rollout_states import State
from serving.core.rollout_timing import span
from serving.core.rollout_types import Rollout, Snapshot
from serving.core.urls import place

_STAGES: Final = {
    State.PENDING: "preparing",
    State.PREPARING: "preparing",
    State.SHADOWING: "shadow traffic",
    State.OBSERVING: "its step",
    State.AWAITING_GATE: "its gate",
    State.BAKING: "its bake",
}


def next_sentence(rollout: Rollout, snapshot: Snapshot) -> str:
    """What the next ticks wait for, or what they will do."""
    if against := withheld(rollout, snapshot):
        return (
            f"{_version(rollout).capitalize()} would be taken back, but version {rollout.stable} "
            f"has no ready replica. Is taken back when it is back, or by an abort: {against}."
        )
    if rollout.state is State.PAUSED:
        return _paused(rollout)
    if lost := stopped_by(rollout):
        return _without(rollout, snapshot, lost)
    match rollout.state:
        case State.PENDING:
            return _asking(rollout, snapshot, "Preparing begins")
        case State.PREPARING:
            return _until_ready(rollout, snapshot)
        case State.SHADOWING:
            return _until_shadowed(rollout, snapshot)
        case State.OBSERVING:
            return _until_stepped(rollout, snapshot)
        case State.AWAITING_GATE:
            return _until_passed(rollout, snapshot)
        case State.PROMOTING:
            then = f"Bakes as soon as every gateway sends all requests to {_version(rollout)}."
            return then + _alone(rollout)
        case State.BAKING:
            return _until_baked(rollout, snapshot) + _alone(rollout)
        case State.ROLLING_BACK:
            return (
                f"Is rolled back as soon as every gateway sends all requests to version "
                f"{rollout.stable} and it is ready."
            )
        case State.ROLLBACK_FAILED:
            return f"Needs a person: {rollout.reason}. Ends by itself once that is mended."
    return _ended(rollout, snapshot)


def _paused(rollout: Rollout) -> str:
    passing = "; approve passes it too" if rollout.stage is State.AWAITING_GATE else ""
    return (
        f"Paused ({rollout.reason}). Goes on with {_STAGES[rollout.stage]} when resumed{passing}."
    )


def replaced_sentence(rollout: Rollout, answering: str | None) -> str:
    """What came of a rollout that is over, where another version answers now; None: none does."""
    succeeded = rollout.state is State.SUCCEEDED
    left = rollout.canary if succeeded else rollout.stable
    came = "has succeeded" if succeeded else "is over"
    now = f"Version {answering} answers" if answering else "No version answers"
    return f"It {came}, and left all requests at version {left}. {now} now."


def _without(rollout: Rollout, snapshot: Snapshot, lost: tuple[str, ...]) -> str:
    away = f"On hold: version {' and version '.join(lost)} has no ready replica."
    if rollout.canary_lost_at is None:
        promote = f"serving rollout promote {rollout.model}"
        return f"{away} Goes on when it is back, or without it: {promote}."
    left = rollout.spec.ready_timeout_s - (snapshot.now - rollout.canary_lost_at)
    return f"{away} Rolled back in {span(left)} if {_version(rollout)} is not back."


def _alone(rollout: Rollout) -> str:
    """That there is nothing to go back to, where that holds nothing up."""
    lost = rollout.stable_lost_at is not None
    return f" Version {rollout.stable} has no ready replica." if lost else ""


def _until_ready(rollout: Rollout, snapshot: Snapshot) -> str:
    left = rollout.spec.ready_timeout_s - (snapshot.now - rollout.entered_at)
    begin = "Shadow traffic begins" if rollout.spec.shadow else "The first step begins"
    return (
        f"{begin} when {_version(rollout)} is ready: {snapshot.canary_ready} of "
        f"{max(1, snapshot.canary_wanted)} replicas are; given up in {span(left)}."
    )


def _until_shadowed(rollout: Rollout, snapshot: Snapshot) -> str:
    shadow, then = rollout.spec.shadow, _following(rollout)
    if shadow is None:
        return _once_evident(rollout, snapshot, then)
    if time_over(rollout, snapshot):
        return _once_evident(rollout, snapshot, then)
    left = shadow.max_duration_s - (snapshot.now - rollout.entered_at)
    return (
        f"{then} after {shadow.min_pairs} pairs of answers ({pairs_compared(snapshot)} compared), "
        f"or in {span(left)}."
    )


def _until_stepped(rollout: Rollout, snapshot: Snapshot) -> str:
    step, then = rollout.current_step, _following(rollout)
    if step is None:
        return f"{then} at once."
    then = f"The gate of step {rollout.step + 1} is asked" if step.gate else then
    left = step.hold_s - (snapshot.now - rollout.step_entered_at)
    if left > 0:
        return f"{then} in {span(left)} if nothing speaks against it."
    return _once_evident(rollout, snapshot, then)


def _until_baked(rollout: Rollout, snapshot: Snapshot) -> str:
    left = rollout.spec.bake.duration_s - (snapshot.now - rollout.entered_at)
    if left > 0:
        return f"Succeeds in {span(left)} if nothing speaks against it."
    return _once_evident(rollout, snapshot, "Succeeds")


def _once_evident(rollout: Rollout, snapshot: Snapshot, then: str) -> str:
    """What follows where time is over: at once, or when somebody or the evidence says so."""
    missing = missing_evidence(rollout, snapshot)
    if not missing or proceeds(rollout, snapshot):
        return _asking(rollout, snapshot, then)
    rule = rollout.spec.analysis.on_insufficient_data
    since = snapshot.now if rollout.waiting_since is None else rollout.waiting_since
    over = rule.after_s - (snapshot.now - since)
    action = {"pause": "is paused", "rollback": "is rolled back", "proceed": "goes on"}[rule.action]
    return (
        f"{then} once there is evidence: {'; '.join(missing)}. "
        f"Without it the rollout {action} in {span(over)}."
    )


def _until_passed(rollout: Rollout, snapshot: Snapshot) -> str:
    step, then = rollout.current_step, _following(rollout)
    passed = gate_passed(rollout, snapshot) or proceeds(rollout, snapshot)
    if step is None or step.gate is None or passed:
        return _asking(rollout, snapshot, then)
    gate = step.gate
    said = so_far(snapshot.providers.get(gate_key(rollout.step)))
    asked = "a person approves" if gate.type == "manual" else f"{place(gate.url)} says yes{said}"
    over = gate.timeout_s - (snapshot.now - rollout.entered_at)
    action = {"pause": "is paused", "rollback": "is rolled back", "proceed": "goes on"}
    return f"{then} when {asked}. Without it the rollout {action[gate.on_timeout]} in {span(over)}."


def _asking(rollout: Rollout, snapshot: Snapshot, then: str) -> str:
    finding = find_event(rollout, snapshot)
    return f"{then} at once." if finding.event else f"{then} when {finding.reason}."


def _following(rollout: Rollout) -> str:
    number = rollout.step + 1
    if number >= len(rollout.spec.steps):
        return f"{_version(rollout).capitalize()} is promoted"
    return f"Step {number + 1} ({rollout.spec.steps[number].weight:g} %) begins"


def _ended(rollout: Rollout, snapshot: Snapshot) -> str:
    if rollout.state is not State.SUCCEEDED:
        return (
            f"It is over, with all requests at version {rollout.stable}. To try "
            f"{_version(rollout)} again: {_start(rollout, rollout.canary)}."
        )
    if rollout.warm_until is None or rollout.warm_until <= snapshot.now:
        return (
            f"It has succeeded, and version {rollout.stable} is no longer kept. To go back to it: "
            f"{_start(rollout, rollout.stable)}."
        )
    left = span(rollout.warm_until - snapshot.now)
    return f"Version {rollout.stable} is kept for another {left}; a rollback to it is immediate."


def _start(rollout: Rollout, version: str) -> str:
    return f"serving rollout start {rollout.model} --to {version}"


def _version(rollout: Rollout) -> str:
    return f"version {rollout.canary}"
