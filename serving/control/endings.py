"""What becomes of a rollout when others take its place: an apply, a rollout, a deployment. Pure."""

from __future__ import annotations

from dataclasses import replace

from serving.control.intents import Intent
from serving.control.records import Record
from serving.core.plan import ServedModel
from serving.core.rollout import transition
from serving.core.rollout_states import Event


def applied(record: Record, intent: Intent, actor: str, now: float) -> Record:
    """After an apply that means this for the record's model."""
    cleared = intent.cleared is not None and intent.cleared.rollout.id == record.rollout.id
    return replace(_applied(record, intent, actor, now), cleared=record.cleared or cleared)


def _applied(record: Record, intent: Intent, actor: str, now: float) -> Record:
    if not record.rollout.active:
        return let_go(record) if intent.lets_go else record
    if intent.ends:
        return superseded(record, intent.ends, actor, now, intent.released)
    if intent.kind == "goes_on" and intent.canary is not None and intent.stable is not None:
        canary, stable = intent.canary, intent.stable
        if record.targets(canary.arm.version, canary.arm.digest):
            versions = {s.arm.version: s for s in (stable, canary)}
            return replace(record, served=ServedModel(stable.arm.version, versions))
    return record


def superseded(record: Record, reason: str, actor: str, now: float, released: bool) -> Record:
    """Taken back, as something else is wanted now; `released`: the layout is no longer its own."""
    if not record.rollout.active:
        return let_go(record)
    if record.taking_back:
        return replace(record, released=record.released or released)
    rollout = transition(record.rollout, Event.SUPERSEDED, now=now, reason=reason, actor=actor)
    return replace(record, rollout=rollout, released=released, retry=True)


def let_go(record: Record) -> Record:
    """An old version is no longer kept: another rollout needs its place."""
    if record.rollout.active:
        return record
    return replace(record, rollout=replace(record.rollout, warm_until=None), released=True)


def ended_with_deployment(record: Record, now: float) -> Record:
    """Nothing of it runs any more; so there is nothing to take back."""
    rollout = record.rollout
    if not rollout.active:
        return let_go(record)
    judged = record.taking_back and not record.retry
    reason = rollout.reason if judged else "the deployment ended while the rollout ran"
    if not record.taking_back:
        rollout = transition(rollout, Event.SUPERSEDED, now=now, reason=reason)
    if rollout.active:
        rollout = transition(rollout, Event.DRAINED, now=now, reason=reason)
    return replace(record, rollout=rollout, released=True, retry=not judged)
