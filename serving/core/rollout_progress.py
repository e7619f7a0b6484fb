"""Which event a tick finds: what brings danger first, then whether the state has done its work."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from serving.core.rollout_danger import EVENTS, NOTHING, Finding, danger, stopped_by, withheld
from serving.core.rollout_hooks import gate_hook, gate_key, hooks, so_far, webhooks
from serving.core.rollout_spec import PROVIDER_KINDS, Gate, TimeoutAction
from serving.core.rollout_states import Event, State
from serving.core.rollout_timing import bake_units_needed, pairs_needed, span, units_needed
from serving.core.rollout_types import Hook, Outcome, Rollout, Snapshot, Verdict
from serving.core.urls import place

WATCHED: Final = frozenset(
    {
        State.SHADOWING,
        State.OBSERVING,
        State.AWAITING_GATE,
        State.PROMOTING,
        State.BAKING,
    }
)
"""Stages with canary traffic, paused or not: arms are watched, triggers judged and obeyed."""


def find_event(rollout: Rollout, snapshot: Snapshot) -> Finding:
    """The event that this tick brings to a rollout whose verdicts are up to date."""
    if rollout.stage in WATCHED:
        finding = danger(rollout, snapshot)
        # A lost arm stops every clock but that of its own return.
        stopped = rollout.state is State.PAUSED or stopped_by(rollout)
        if finding.event or stopped or withheld(rollout, snapshot):
            return finding
    match rollout.state:
        case State.PENDING:
            return _asked(rollout, snapshot, "pre-rollout", Event.START, "the rollout may begin")
        case State.PREPARING:
            return _preparing(rollout, snapshot)
        case State.PROMOTING:
            return _promoting(rollout, snapshot)
        case State.ROLLING_BACK | State.ROLLBACK_FAILED:
            return _taking_back(rollout, snapshot)
        case State.SHADOWING | State.OBSERVING | State.AWAITING_GATE | State.BAKING:
            return _stepping(rollout, snapshot)
    return NOTHING


def missing_evidence(rollout: Rollout, snapshot: Snapshot) -> tuple[str, ...]:
    """Why shadow traffic, the step or the bake may not end although its time is over.

    One sentence each. No data is no success: each provider has to answer, each trigger of a step's
    `require_pass` to pass, and there must have been enough to judge by.
    """
    if rollout.spec.analysis.dry_run:
        return ()
    step = rollout.current_step
    verdicts = {v.trigger: v for v in rollout.verdicts}
    found = [
        f"the step requires a pass of {verdicts[name].sentence if name in verdicts else name}"
        for name in (step.require_pass if step is not None else ())
        if name not in verdicts or verdicts[name].verdict is not Outcome.PASS
    ]
    found += [v.sentence for v in verdicts.values() if _unanswered(rollout, v)]
    if few := _too_few(rollout, snapshot):
        found.append(few)
    return tuple(found)


def _too_few(rollout: Rollout, snapshot: Snapshot) -> str:
    """What is missing of the pairs or requests that there must have been; "" where nothing is."""
    spec, step = rollout.spec, rollout.current_step
    if rollout.state is State.SHADOWING:
        pairs, needed = pairs_compared(snapshot), pairs_needed(spec)
        return (
            ""
            if pairs >= needed
            else (
                f"{pairs} pairs of answers were compared of the {needed} "
                "that a promotion without steps needs"
            )
        )
    if rollout.state is State.BAKING:
        answered = canary_units(snapshot)
        needed = 0 if rollout.units_waived else bake_units_needed(spec)
        what = "a rollout"
    elif step is not None:
        answered, needed = step_units(rollout, snapshot), units_needed(spec, step)
        what = "this step"
    else:
        return ""
    return (
        ""
        if answered >= needed
        else (
            f"version {rollout.canary} has answered {answered} of the {needed} "
            f"{spec.assignment.units} that {what} needs"
        )
    )


def _unanswered(rollout: Rollout, verdict: Verdict) -> bool:
    """Whether a provider has not said "ok", or nothing is known, and nobody resumed past that."""
    trigger, step = rollout.spec.analysis.trigger(verdict.trigger), rollout.current_step
    if trigger is None:
        return False
    if trigger.kind not in PROVIDER_KINDS and verdict.verdict is not Outcome.UNKNOWN:
        return False
    known = (verdict.trigger, verdict.verdict.value) in rollout.acknowledged
    required = step is not None and verdict.trigger in step.require_pass
    return not known and not required and verdict.verdict is not Outcome.PASS


def due_hooks(rollout: Rollout, snapshot: Snapshot) -> tuple[Hook, ...]:
    """The web services that the rollout waits for now, to be asked until it goes on."""
    if rollout.state is State.PENDING:
        return hooks(rollout, "pre-rollout")
    goes_on = work_done(rollout, snapshot) or proceeds(rollout, snapshot)
    gate = rollout.current_step.gate if rollout.current_step is not None else None
    at_gate = rollout.state is State.AWAITING_GATE and not goes_on
    if at_gate and gate is not None and gate.type == "webhook":
        return (gate_hook(rollout.step, gate),)
    if goes_on and rollout.state is not State.BAKING and not _gate_ahead(rollout):
        return hooks(rollout, "pre-step")
    return ()


def gate_passed(rollout: Rollout, snapshot: Snapshot) -> str:
    """Who passed the running step's gate and why, as a sentence; "" where nobody has."""
    approval = next((a for a in reversed(rollout.approvals) if a.step == rollout.step), None)
    if approval is not None:
        return f"{approval.actor} approved: {approval.reason or 'no reason given'}"
    answer = snapshot.providers.get(gate_key(rollout.step))
    return "the gate's webhook said yes" if answer and answer.outcome == "ok" else ""


def work_done(rollout: Rollout, snapshot: Snapshot) -> str:
    """Why the shadow, the step, its gate or the bake is done, as a sentence; "" while it is not."""
    if stopped_by(rollout):
        return ""
    if rollout.state is State.AWAITING_GATE:
        return gate_passed(rollout, snapshot)
    over = time_over(rollout, snapshot)
    return "" if over and missing_evidence(rollout, snapshot) else over


def time_over(rollout: Rollout, snapshot: Snapshot) -> str:
    """Why shadow, step or bake ends if its evidence is there, as a sentence; "" where not yet."""
    if rollout.state is State.SHADOWING:
        return _shadow_over(rollout, snapshot)
    if rollout.state is State.BAKING:
        limit = rollout.spec.bake.duration_s
        over = snapshot.now - rollout.entered_at >= limit
        return f"{span(limit)} of bake, no objection" if over else ""
    step = rollout.current_step
    if rollout.state is not State.OBSERVING or step is None:
        return ""
    if snapshot.now - rollout.step_entered_at < step.hold_s:
        return ""
    return f"step {rollout.step + 1} ({step.weight:g} %) held for {span(step.hold_s)}, no objection"


def proceeds(rollout: Rollout, snapshot: Snapshot) -> bool:
    """Whether the plan says to go on without what has been waited for long enough."""
    overdue = None if stopped_by(rollout) else _overdue(rollout, snapshot)
    return overdue is not None and overdue[0] == "proceed"


def pairs_compared(snapshot: Snapshot) -> int:
    """Pairs of answers that shadow traffic has compared."""
    return sum(c.pairs for c in snapshot.counts.values())


def canary_units(snapshot: Snapshot) -> int:
    """Requests, or users, that the canary has had in the whole rollout."""
    return sum(row.requests for c in snapshot.counts.values() for row in c.canary.values())


def step_units(rollout: Rollout, snapshot: Snapshot) -> int:
    """Requests, or users, that the canary has had in the running step.

    Not those that it answered for a stable without replicas: nothing is beside them to compare.
    """
    weight = rollout.planned_weight
    epochs = (e.epoch for e in rollout.epochs if (e.step, e.weight) == (rollout.step, weight))
    counts = (snapshot.counts[e] for e in epochs if e in snapshot.counts)
    return sum(row.requests for c in counts for row in c.canary.values())


def _preparing(rollout: Rollout, snapshot: Snapshot) -> Finding:
    if snapshot.canary_failed:
        return Finding(
            Event.NOT_READY, f"version {rollout.canary} cannot start: {snapshot.canary_failed}"
        )
    # Capacity before weight: all replicas, not the first.
    wanted = max(1, snapshot.canary_wanted)
    if snapshot.canary_ready >= wanted:
        who = "the replica" if wanted == 1 else f"all {wanted} replicas"
        verb = "is" if wanted == 1 else "are"
        return Finding(Event.READY, f"{who} of version {rollout.canary} {verb} ready")
    if snapshot.now - rollout.entered_at >= rollout.spec.ready_timeout_s and snapshot.current:
        limit = span(rollout.spec.ready_timeout_s)
        return Finding(
            Event.NOT_READY,
            f"{snapshot.canary_ready} of {wanted} replicas of version {rollout.canary} were ready "
            f"after {limit}",
        )
    return NOTHING


def _promoting(rollout: Rollout, snapshot: Snapshot) -> Finding:
    if snapshot.gateways_at < snapshot.revision:
        return NOTHING
    return Finding(Event.PROMOTED, f"every gateway sends all requests to version {rollout.canary}")


def _taking_back(rollout: Rollout, snapshot: Snapshot) -> Finding:
    if not snapshot.gateways_at:
        problem = "no gateway has said which routes it runs"
    elif snapshot.gateways_at < snapshot.revision:
        problem = f"a gateway still runs revision {snapshot.gateways_at} of the routes"
    # Where the canary never had traffic there is nothing that stable would have to take over.
    elif rollout.had_traffic and snapshot.stable_ready < 1:
        problem = f"version {rollout.stable} has no ready replica"
    else:
        # Why it was taken back is what people ask for later.
        return Finding(Event.DRAINED, rollout.reason)
    overdue = snapshot.now - rollout.entered_at >= rollout.spec.ready_timeout_s
    if overdue and rollout.state is State.ROLLING_BACK:
        why = f": {rollout.reason}" if rollout.reason else ""
        return Finding(Event.STUCK, f"{problem}; taken back by {rollout.actor}{why}")
    return NOTHING


def _stepping(rollout: Rollout, snapshot: Snapshot) -> Finding:
    if not snapshot.current:
        waiting = rollout.waiting_since is not None
        return Finding(reason="gateways have said what they counted meanwhile", waiting=waiting)
    if done := work_done(rollout, snapshot):
        return _forward(rollout, snapshot, done)
    if rollout.state is State.AWAITING_GATE and (refused := _gate_refused(rollout, snapshot)):
        return refused
    if overdue := _overdue(rollout, snapshot):
        return _timed_out(rollout, snapshot, *overdue)
    if time_over(rollout, snapshot):
        return Finding(reason="; ".join(missing_evidence(rollout, snapshot)), waiting=True)
    return NOTHING


def _forward(rollout: Rollout, snapshot: Snapshot, done: str) -> Finding:
    if _gate_ahead(rollout):
        return Finding(Event.GATE_NEEDED, f"{done}; the gate decides")
    if rollout.state is State.BAKING:
        return Finding(Event.BAKE_DONE, done)
    if rollout.step + 1 >= len(rollout.spec.steps):
        event = Event.PROMOTE
    elif rollout.state is State.SHADOWING:
        event = Event.SHADOW_DONE
    else:
        event = Event.GATE_PASSED if rollout.state is State.AWAITING_GATE else Event.STEP_DONE
    return _asked(rollout, snapshot, "pre-step", event, done)


def _gate_ahead(rollout: Rollout) -> bool:
    step = rollout.current_step
    return rollout.state is State.OBSERVING and step is not None and step.gate is not None


def _shadow_over(rollout: Rollout, snapshot: Snapshot) -> str:
    shadow = rollout.spec.shadow
    if shadow is None:
        return "the plan has no shadow traffic"
    pairs = pairs_compared(snapshot)
    if pairs >= shadow.min_pairs:
        return f"{pairs} pairs of answers were compared"
    if snapshot.now - rollout.entered_at >= shadow.max_duration_s:
        return f"{span(shadow.max_duration_s)} of shadow traffic gave {pairs} pairs of answers"
    return ""


def _gate_refused(rollout: Rollout, snapshot: Snapshot) -> Finding | None:
    """A gate that says no has been asked for its judgement: one answer is enough."""
    answer = snapshot.providers.get(gate_key(rollout.step))
    if answer is None or answer.outcome != "fail":
        return None
    about = f": {answer.message}" if answer.message else ""
    return Finding(Event.FAIL, f"the gate of step {rollout.step + 1} refused{about}")


def _overdue(rollout: Rollout, snapshot: Snapshot) -> tuple[TimeoutAction, str] | None:
    """What to do where a gate or evidence has been waited for too long, and why."""
    if rollout.state is State.AWAITING_GATE:
        return _gate_timeout(rollout, snapshot)
    return _insufficient(rollout, snapshot) if time_over(rollout, snapshot) else None


def _gate_timeout(rollout: Rollout, snapshot: Snapshot) -> tuple[TimeoutAction, str] | None:
    step = rollout.current_step
    gate = step.gate if step is not None and step.gate is not None else Gate()
    if snapshot.now - rollout.entered_at < gate.timeout_s:
        return None
    reason = f"nobody passed the gate of step {rollout.step + 1} within {span(gate.timeout_s)}"
    return gate.on_timeout, reason + so_far(snapshot.providers.get(gate_key(rollout.step)))


def _insufficient(rollout: Rollout, snapshot: Snapshot) -> tuple[TimeoutAction, str] | None:
    why = "; ".join(missing_evidence(rollout, snapshot))
    rule = rollout.spec.analysis.on_insufficient_data
    since = snapshot.now if rollout.waiting_since is None else rollout.waiting_since
    if not why or snapshot.now - since < rule.after_s:
        return None
    after = f"{span(rule.after_s)} after the {_AFTER[rollout.state]}"
    return rule.action, f"evidence was still missing {after}: {why}"


_AFTER: Final = {
    State.SHADOWING: "shadow traffic",
    State.OBSERVING: "hold",
    State.BAKING: "bake",
}


def _timed_out(rollout: Rollout, snapshot: Snapshot, action: TimeoutAction, reason: str) -> Finding:
    if action == "proceed":
        # While webhooks are asked first, evidence is still what is missing.
        going = _forward(rollout, snapshot, f"{reason}; the plan says to proceed")
        return replace(going, waiting=True)
    if action == "rollback" and rollout.stable_lost_at is not None:
        return Finding(reason=reason, waiting=True)  # nobody else could answer
    return Finding(EVENTS[action], reason)


def _asked(
    rollout: Rollout,
    snapshot: Snapshot,
    event: str,
    then: Event,
    reason: str,
) -> Finding:
    """`then`, once every webhook of this event has said yes."""
    for webhook, hook in zip(webhooks(rollout, event), hooks(rollout, event), strict=True):
        where = f"the {event} webhook at {place(webhook.url)}"
        answer = snapshot.providers.get(hook.key)
        if answer is not None and answer.fails >= webhook.failures:
            about = f": {answer.message}" if answer.message else ""
            return Finding(Event.FAIL, f"{where} refused {answer.fails} times in a row{about}")
        if answer is None or answer.outcome != "ok":
            return Finding(reason=f"{where} says yes{so_far(answer)}")
    return Finding(then, reason)
