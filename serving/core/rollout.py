"""How a rollout goes on: one pure decision a tick, and the commands of a person.

Every tick `decide` looks at the rollout and a snapshot of the world. It notes what was seen (arms
that are away, restarts, the triggers' verdicts), finds at most one event, and lets the table of
`serving.core.rollout_states` say where it leads. What brings danger is looked at first: a trigger
that rolls back, a canary that will not come back, a provider that does not answer, a trigger that
pauses; only then whether the state has done its work.

Whenever the weight, the step, the frozen baseline or the part of the bake changes, a new epoch
begins. Gateways count by epoch, so each count belongs to one known weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from serving.core import triggers
from serving.core.one_arm import part_at
from serving.core.rollout_baseline import (
    drift_bins,
    latency_bounds,
    moved_bounds,
    stable_so_far,
)
from serving.core.rollout_clocks import clocks_caught_up, clocks_watched
from serving.core.rollout_counts import EpochCounts
from serving.core.rollout_progress import WATCHED, find_event
from serving.core.rollout_spec import FLOOR_S, RolloutSpec
from serving.core.rollout_states import ALONE, TERMINAL, TRANSITIONS, Event, State, target_of
from serving.core.rollout_types import (
    Approval,
    Epoch,
    Outcome,
    ProviderState,
    Rollout,
    Snapshot,
    Verdict,
)
from serving.errors import ConflictError

__all__ = [
    "COMMANDS",
    "Approval",
    "Epoch",
    "Event",
    "Outcome",
    "ProviderState",
    "Rollout",
    "Snapshot",
    "State",
    "Verdict",
    "command",
    "decide",
    "new_rollout",
    "transition",
]

CONTROLLER: Final = "controller"
"""The actor of every transition that no person asked for."""

COMMANDS: Final = {
    "pause": Event.PAUSE,
    "resume": Event.RESUME,
    "promote": Event.PROMOTE,
    "approve": Event.APPROVE,
    "abort": Event.ABORT,
    "rollback": Event.ROLLBACK,
    "superseded": Event.SUPERSEDED,
}
"""What a person may ask for, and what another apply does."""

_PROMOTABLE: Final = frozenset({State.SHADOWING, State.OBSERVING, State.AWAITING_GATE})
_RESTARTS_KEPT: Final = 100  # more than any crash-loop trigger asks about
_STEPPING: Final = frozenset({State.OBSERVING, State.AWAITING_GATE})


def new_rollout(
    rollout_id: str,
    *,
    model: str,
    stable: tuple[str, str],
    canary: tuple[str, str],
    spec: RolloutSpec,
    salt: str,
    actor: str,
    reason: str,
    now: float,
) -> Rollout:
    """A rollout that is about to begin. `stable` and `canary` are (version, digest)."""
    return Rollout(
        id=rollout_id,
        model=model,
        stable=stable[0],
        canary=canary[0],
        stable_digest=stable[1],
        canary_digest=canary[1],
        spec=spec,
        salt=salt,
        created_at=now,
        changed_at=now,
        entered_at=now,
        step_entered_at=now,
        epochs=(Epoch(epoch=0, step=-1, weight=0.0),),
        reason=reason,
        actor=actor,
    )


def decide(rollout: Rollout, snapshot: Snapshot) -> Rollout:
    """The rollout after one tick: at most one transition, verdicts refreshed. Never raises."""
    if rollout.state in TERMINAL:
        return _let_go(rollout, snapshot.now)
    after = rollout
    if rollout.stage in WATCHED:
        after = _judged(_arms_watched(_restarts_noted(rollout, snapshot), snapshot), snapshot)
    finding = find_event(after, snapshot)
    if finding.event is not None:
        # What has been taken back was so by whoever gave the order, not by its last effect.
        actor = rollout.actor if finding.event is Event.DRAINED else CONTROLLER
        after = _moved(after, finding.event, snapshot.now, finding.reason, actor)
    elif finding.waiting and after.waiting_since is None:
        after = replace(after, waiting_since=snapshot.now)
    elif not finding.waiting:
        after = replace(after, waiting_since=None)
    return _in_epoch(after, {**_frozen(after, snapshot), **_bake_part(after, snapshot.now)})


def command(rollout: Rollout, name: str, actor: str, reason: str, now: float) -> Rollout:
    """The rollout after a person's command, one of `COMMANDS`.

    Raises `ConflictError` with one sentence where the command is not legal now; nothing changes.
    """
    if name not in COMMANDS:
        allowed = ", ".join(COMMANDS)
        raise ConflictError(f"a rollout has no command {name!r}; allowed: {allowed}")
    event = COMMANDS[name]
    if event is Event.APPROVE:
        rollout = _approved(rollout, actor, reason, now)
        if rollout.state is State.AWAITING_GATE:
            return rollout  # the next tick passes the gate, if nothing speaks against it
    if event is Event.PROMOTE and rollout.canary_lost_at is not None:
        raise ConflictError(
            f"{title(rollout)} cannot be promoted: "
            f"version {rollout.canary} has no ready replica now"
        )
    if rollout.state is State.SUCCEEDED and event is Event.ROLLBACK and not _kept(rollout, now):
        raise ConflictError(
            f"{title(rollout)} has succeeded and version {rollout.stable} is no longer kept; "
            f"to go back to it: serving rollout start {rollout.model} --to {rollout.stable}"
        )
    return transition(rollout, event, now=now, reason=reason, actor=actor)


def transition(
    rollout: Rollout, event: Event, *, now: float, reason: str, actor: str = CONTROLLER
) -> Rollout:
    """The rollout after an event. Raises `ConflictError` where the table has no such move."""
    if not _legal(rollout, event):
        raise ConflictError(_refusal(rollout, event))
    return _in_epoch(_moved(rollout, event, now, reason, actor), {})


def title(rollout: Rollout) -> str:
    """How a rollout is spoken of: "the rollout of digits from version 1 to 2"."""
    return f"the rollout of {rollout.model} from version {rollout.stable} to {rollout.canary}"


def _moved(rollout: Rollout, event: Event, now: float, reason: str, actor: str) -> Rollout:
    target = target_of(rollout.state, event, rollout.stage)
    rollout = clocks_caught_up(rollout, now)
    moved = replace(
        rollout,
        state=target,
        resume_to=None,
        changed_at=now,
        entered_at=now,
        waiting_since=None,
        reason=reason,
        actor=actor,
        finished_at=now if target in TERMINAL else None,
        warm_until=None,
    )
    if target is State.PAUSED:
        return replace(moved, resume_to=rollout.state, elapsed_s=now - rollout.entered_at)
    if rollout.state is State.PAUSED and target is rollout.resume_to:
        return _resumed(rollout, moved, now)
    if rollout.state is State.PAUSED and event is Event.PROMOTE:
        moved = replace(moved, acknowledged=_known(rollout))
    if target is State.SUCCEEDED:
        moved = replace(moved, warm_until=now + rollout.spec.keep_previous_s)
    if target not in WATCHED:
        moved = replace(moved, stable_lost_at=None, canary_lost_at=None)
    step = _step_after(rollout, event)
    return moved if step == rollout.step else replace(moved, step=step, step_entered_at=now)


def _step_after(rollout: Rollout, event: Event) -> int:
    if event in (Event.SHADOW_DONE, Event.STEP_DONE, Event.GATE_PASSED):
        return rollout.step + 1
    return len(rollout.spec.steps) if event is Event.PROMOTE else rollout.step


def _resumed(paused: Rollout, moved: Rollout, now: float) -> Rollout:
    """Go on where it stopped: the pause is no part of a hold, and its causes are known now."""
    # A gate's time starts anew: the gate may have been what paused the rollout.
    at_gate = moved.state is State.AWAITING_GATE
    bake_over = paused.elapsed_s >= paused.spec.bake.duration_s
    resumed = replace(
        moved,
        entered_at=now if at_gate else now - paused.elapsed_s,
        step_entered_at=paused.step_entered_at + (now - paused.entered_at),
        acknowledged=_known(paused),
        # All that a bake can have lacked whose time was over is known to who resumes it.
        units_waived=moved.state is State.BAKING and bake_over,
    )
    return clocks_watched(resumed, now)


def _known(paused: Rollout) -> tuple[tuple[str, str], ...]:
    """What a person who ends a pause goes on in spite of."""
    known = {
        (v.trigger, v.verdict.value)
        for v in paused.verdicts
        if v.verdict is Outcome.UNKNOWN or (v.verdict is Outcome.FAIL and v.action == "pause")
    }
    return tuple(sorted({*paused.acknowledged, *known}))


def _approved(rollout: Rollout, actor: str, reason: str, now: float) -> Rollout:
    if rollout.stage is not State.AWAITING_GATE:
        raise ConflictError(_refusal(rollout, Event.APPROVE))
    given = next((a for a in rollout.approvals if a.step == rollout.step), None)
    if given is not None:
        raise ConflictError(
            f"{title(rollout)}: the gate of step {rollout.step + 1} was approved by {given.actor}"
        )
    approval = Approval(rollout.step, actor, reason, now)
    return replace(rollout, approvals=(*rollout.approvals, approval))


def _legal(rollout: Rollout, event: Event) -> bool:
    """Whether the table has the move, and it makes sense to a paused rollout's stage."""
    if event is Event.APPROVE and rollout.resume_to is not State.AWAITING_GATE:
        return False
    if event is Event.PROMOTE and rollout.stage not in _PROMOTABLE:
        return False
    return (rollout.state, event) in TRANSITIONS


def _refusal(rollout: Rollout, event: Event) -> str:
    """Why an event changes nothing, and what would."""
    names = [n for n, e in COMMANDS.items() if n != "superseded" and _allowed(rollout, e)]
    state = rollout.state.value.replace("_", " ")
    return (
        f"{title(rollout)} is {state}: {event.value!r} is not possible; "
        f"possible now: {', '.join(names) or 'nothing'}"
    )


def _allowed(rollout: Rollout, event: Event) -> bool:
    if event is Event.APPROVE:
        return rollout.stage is State.AWAITING_GATE
    return _legal(rollout, event)


def _kept(rollout: Rollout, now: float) -> bool:
    return rollout.warm_until is not None and now < rollout.warm_until


def _let_go(rollout: Rollout, now: float) -> Rollout:
    """A rollout that has ended changes once more: when the old version need not be kept."""
    if rollout.warm_until is None or _kept(rollout, now):
        return rollout
    return replace(rollout, warm_until=None)


def _restarts_noted(rollout: Rollout, snapshot: Snapshot) -> Rollout:
    restarts = sorted({*rollout.restarts, *snapshot.restarts})[-_RESTARTS_KEPT:]
    return replace(rollout, restarts=tuple(restarts))


def _arms_watched(rollout: Rollout, snapshot: Snapshot) -> Rollout:
    """With which arms are away since when."""
    now = snapshot.now
    watched = replace(
        rollout,
        stable_lost_at=_lost_at(rollout.stable_lost_at, snapshot.stable_ready, now),
        canary_lost_at=_lost_at(rollout.canary_lost_at, snapshot.canary_ready, now),
    )
    return clocks_watched(watched, now)


def _lost_at(before: float | None, ready: int, now: float) -> float | None:
    if ready > 0:
        return None
    return now if before is None else before


def _judged(rollout: Rollout, snapshot: Snapshot) -> Rollout:
    verdicts = triggers.evaluate(rollout, snapshot)
    # Who resumed past a failure knows of that one, not of the next.
    over = {
        (v.trigger, known)
        for v in verdicts
        for known in (Outcome.FAIL, Outcome.UNKNOWN)
        if v.verdict is Outcome.PASS or (known is Outcome.UNKNOWN and v.verdict is not known)
    }
    lasting = tuple(a for a in rollout.acknowledged if a not in over)
    return replace(rollout, verdicts=verdicts, acknowledged=lasting)


def _frozen(rollout: Rollout, snapshot: Snapshot) -> dict[str, Any]:
    """The baseline for the next epoch: anew at each step's entry, else what is not there yet.

    Within a step latency bounds follow stable, where it has become faster or slower.
    """
    if rollout.stage not in _STEPPING | ALONE:
        return {}
    current, kinds = rollout.current, {t.kind for t in rollout.spec.analysis.triggers}
    entering = rollout.step != current.step
    found: dict[str, Any] = {}
    if "latency" in kinds:
        found["latency_bounds"] = _latency_bounds(rollout, snapshot, entering)
    unknown = rollout.stage in _STEPPING and current.drift_bins is None
    if "drift" in kinds and (entering or unknown):
        found["drift_bins"] = drift_bins(stable_so_far(snapshot.counts)) or current.drift_bins
    return found


def _latency_bounds(rollout: Rollout, snapshot: Snapshot, entering: bool) -> tuple[int, ...] | None:
    frozen, analysis = rollout.current.latency_bounds, rollout.spec.analysis
    floor_s = min((t.floor_s for t in analysis.triggers if t.kind == "latency"), default=FLOOR_S)
    if entering or frozen is None:
        return latency_bounds(stable_so_far(snapshot.counts), floor_s) or frozen
    if rollout.stage in ALONE:
        return frozen
    since = snapshot.counts.get(rollout.epoch, EpochCounts()).arm("stable")
    changes = sum(e.step == rollout.step for e in rollout.epochs) - 1
    return moved_bounds(frozen, since, changes, floor_s) or frozen


def _bake_part(rollout: Rollout, now: float) -> dict[str, Any]:
    """The part of the bake that runs; parts only go on, whatever clocks do."""
    if rollout.state is not State.BAKING:
        return {}
    part = part_at(now - rollout.entered_at, rollout.spec.bake.duration_s)
    return {"part": max(part, rollout.current.part)}


def _in_epoch(rollout: Rollout, baseline: dict[str, Any]) -> Rollout:
    """In a new epoch, where weight, step or baseline are no longer those of the last one."""
    current = rollout.current
    wanted = replace(current, step=rollout.step, weight=rollout.weight, **baseline)
    if wanted == current:
        return rollout
    return replace(rollout, epochs=(*rollout.epochs, replace(wanted, epoch=current.epoch + 1)))
