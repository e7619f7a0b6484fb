"""What a change of a rollout leaves in the audit log: enough to tell why, and to replay it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from serving.control.overlay import default_version
from serving.control.records import Record
from serving.core.rollout import CONTROLLER
from serving.core.rollout_danger import stopped_by
from serving.core.rollout_states import State
from serving.core.rollout_types import Outcome, Rollout
from serving.store.audit import AuditEntry

START: Final = "start"
LET_GO: Final = "let_go"
EPOCH: Final = "epoch"


@dataclass(frozen=True, slots=True)
class Told:
    """A command that a person gave to a rollout."""

    rollout: str
    command: str
    actor: str
    reason: str


def entries(
    before: Record | None, after: Record, now: float, told: Told | None = None
) -> list[AuditEntry]:
    """The entry for one commit's change of a rollout, if it is more than new counts."""
    old, new = before.rollout if before else None, after.rollout
    action = _action(old, new)
    # What is not a transition is the controller's own doing, and so is the end of a rollback.
    ordered = old is None or (old.state is not new.state and old.state is not State.ROLLING_BACK)
    actor, reason = (new.actor if ordered else CONTROLLER), new.reason
    if told is not None and told.rollout == new.id:
        action, actor, reason = told.command, told.actor, told.reason
    if not action:
        return []
    if action == EPOCH and old is not None:
        # No transition began it, so the last one's reason is not its own.
        reason = _why_epoch(old, new)
    body = _standing(new) | {"from": old.state.value if old else None, "reason": reason}
    if old is None:
        body |= {
            "model": new.model,
            "stable": new.stable,
            "stable_digest": new.stable_digest,
            "canary": new.canary,
            "canary_digest": new.canary_digest,
            "plan": new.spec.plan,
        }
    body["verdicts"] = [v.to_dict() for v in new.verdicts if v.verdict is not Outcome.HOLD]
    return [AuditEntry(now, actor, action, new.id, body)]


def _action(old: Rollout | None, new: Rollout) -> str:
    if old is None:
        return START
    if old.state is not new.state:
        return new.state.value
    if old.step != new.step:
        return "step"
    if old.warm_until != new.warm_until:
        return LET_GO
    return EPOCH if old.epochs != new.epochs else ""


def _why_epoch(old: Rollout, new: Rollout) -> str:
    """Why an epoch began within a state and a step: all that is different in it."""
    before, now, stable = old.current, new.current, new.stable
    found = []
    if before.weight != now.weight:
        found.append(_why_weight(old, new))
    if before.latency_bounds != now.latency_bounds:
        found.append(
            f"latency bounds were set from what version {stable} answered"
            if before.latency_bounds is None
            else f"latency bounds follow version {stable}, whose latency has changed"
        )
    if before.drift_bins != now.drift_bins:
        found.append(f"drift is judged from now on, by what version {stable} predicted")
    if before.part != now.part:
        found.append(f"part {now.part + 1} of the bake begins")
    return "; ".join(found)


def _why_weight(old: Rollout, new: Rollout) -> str:
    if lost := stopped_by(new):
        return f"version {' and version '.join(lost)} has no ready replica"
    return f"version {' and version '.join(stopped_by(old))} has a ready replica again"


def _standing(rollout: Rollout) -> dict[str, Any]:
    """Where a rollout stands: its latest entry says it, so the log replays to the present."""
    return {
        "to": rollout.state.value,
        "step": rollout.step,
        "epoch": rollout.epoch,
        "weight": rollout.weight,
        "serves": default_version(rollout),
        "warm_until": rollout.warm_until,
    }
