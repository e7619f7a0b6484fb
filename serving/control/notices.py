"""What a rollout's webhooks are told after a commit: transitions, and alerts for a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from serving.core.rollout_spec import WebhookEvent
from serving.core.rollout_states import State
from serving.core.rollout_types import Outcome, Rollout

_ALARMING: Final = frozenset({State.PAUSED, State.ROLLING_BACK, State.ROLLBACK_FAILED})


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing that happened to a rollout. `at` is Unix seconds, `revision` the route table's.

    `key` is the same whenever the same thing is told again, after a restart too. `alert` asks for
    a person's attention.
    """

    rollout: Rollout
    event: WebhookEvent
    subject: Literal["transition", "verdict"]
    message: str
    key: str
    revision: int
    at: float
    alert: bool = False


def notices(before: Rollout | None, after: Rollout, *, revision: int, now: float) -> list[Notice]:
    """What is to be told of a tick or a command; `before` is None for a new rollout."""
    return [
        *_transitions(before, after, revision, now),
        *_verdicts(before, after, revision, now),
    ]


def _transitions(before: Rollout | None, after: Rollout, revision: int, now: float) -> list[Notice]:
    if before is not None and (before.state, before.step) == (after.state, after.step):
        return []
    came_from = f"{before.state} → " if before is not None and before.state != after.state else ""
    message = f"{came_from}{_place(after)}: {after.reason}"
    key = f"{after.id}/{after.state}/{after.step}/{after.changed_at!r}"
    events: list[WebhookEvent] = ["event"] if after.active else ["event", "post-rollout"]
    alert = after.state in _ALARMING
    return [
        Notice(after, event, "transition", message, f"{key}/{event}", revision, now, alert)
        for event in events
    ]


def _place(rollout: Rollout) -> str:
    step = rollout.current_step
    if step is None:
        return rollout.state
    return f"{rollout.state} at step {rollout.step + 1} of {len(rollout.spec.steps)}"


def _verdicts(before: Rollout | None, after: Rollout, revision: int, now: float) -> list[Notice]:
    """Triggers that fail now and did not before, also where nothing follows from it."""
    failed = {v.trigger for v in before.verdicts if v.verdict is Outcome.FAIL} if before else set()
    return [
        Notice(
            after,
            "event",
            "verdict",
            f"{v.trigger} fails: {v.sentence}",
            f"{after.id}/{v.trigger}/{now!r}",
            revision,
            now,
            alert=True,
        )
        for v in after.verdicts
        if v.verdict is Outcome.FAIL and v.trigger not in failed
    ]
