"""What speaks against a new version, which every tick with traffic looks at first.

A trigger that rolls back, a canary that will not come back, a provider that does not answer, a
trigger that pauses. What would take the version back is withheld while the old one has no ready
replica: a version that fails some requests is better than none that answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from serving.core.rollout_spec import PROVIDER_KINDS, TriggerAction
from serving.core.rollout_states import ALONE, PAUSABLE, Event
from serving.core.rollout_timing import span
from serving.core.rollout_types import Outcome, Rollout, Snapshot, Verdict

EVENTS: Final[dict[TriggerAction, Event]] = {"rollback": Event.FAIL, "pause": Event.PAUSE}


@dataclass(frozen=True, slots=True)
class Finding:
    """The event that a tick found with its reason; or none, and whether evidence is waited for.

    Where web services are waited for, the reason is what they have to say first.
    """

    event: Event | None = None
    reason: str = ""
    waiting: bool = False


NOTHING: Final = Finding()


def danger(rollout: Rollout, snapshot: Snapshot) -> Finding:
    """The event that speaks against the new version, whose verdicts are up to date."""
    against = _against(rollout, snapshot)
    if against and rollout.stable_lost_at is None:
        return Finding(Event.FAIL, against)
    if gone := _canary_gone(rollout, snapshot):
        return Finding(Event.NOT_READY, gone)
    analysis = rollout.spec.analysis
    if analysis.dry_run or rollout.state not in PAUSABLE:
        return NOTHING
    if analysis.on_provider_error.action == "pause" and (
        silent := _silent_provider(rollout, snapshot)
    ):
        return Finding(Event.PAUSE, silent)
    if failing := fired(rollout, "pause"):
        return Finding(Event.PAUSE, _sentences(failing))
    return NOTHING


def withheld(rollout: Rollout, snapshot: Snapshot) -> str:
    """Why the version would be taken back if there were another to answer; "" where nothing is."""
    return _against(rollout, snapshot) if rollout.stable_lost_at is not None else ""


def stopped_by(rollout: Rollout) -> tuple[str, ...]:
    """The versions, stable first, that have no ready replica now and stop the clocks by it."""
    missed = rollout.stable_lost_at is not None and rollout.stage not in ALONE
    stable = (rollout.stable,) if missed else ()
    canary = (rollout.canary,) if rollout.canary_lost_at is not None else ()
    return stable + canary


def fired(rollout: Rollout, action: TriggerAction) -> tuple[Verdict, ...]:
    """The verdicts that fail, ask for `action`, and were not resumed past."""
    return tuple(
        v
        for v in rollout.verdicts
        if v.verdict is Outcome.FAIL
        and v.action == action
        and (v.trigger, Outcome.FAIL) not in rollout.acknowledged
    )


def _against(rollout: Rollout, snapshot: Snapshot) -> str:
    """Why triggers and providers take the version back; "" where they do not."""
    analysis = rollout.spec.analysis
    if analysis.dry_run:
        return ""
    if failing := fired(rollout, "rollback"):
        return _sentences(failing)
    silent_fails = analysis.on_provider_error.action == "rollback"
    return _silent_provider(rollout, snapshot) if silent_fails else ""


def _sentences(verdicts: tuple[Verdict, ...]) -> str:
    return "; ".join(v.sentence for v in verdicts)


def _canary_gone(rollout: Rollout, snapshot: Snapshot) -> str:
    last_to_answer = rollout.stable_lost_at is not None and snapshot.canary_ready
    if snapshot.canary_failed and not last_to_answer:
        return f"version {rollout.canary} failed: {snapshot.canary_failed}"
    lost_at, limit = rollout.canary_lost_at, rollout.spec.ready_timeout_s
    if lost_at is not None and snapshot.now - lost_at >= limit and snapshot.current:
        return f"version {rollout.canary} has had no ready replica for {span(limit)}"
    return ""


def _silent_provider(rollout: Rollout, snapshot: Snapshot) -> str:
    limit = rollout.spec.analysis.on_provider_error.count
    for trigger in rollout.spec.analysis.triggers:
        answer = snapshot.providers.get(trigger.name)
        if trigger.kind not in PROVIDER_KINDS or answer is None or answer.errors < limit:
            continue
        if (trigger.name, Outcome.UNKNOWN) not in rollout.acknowledged:
            about = f": {answer.message}" if answer.message else ""
            return f"{trigger.name} did not answer {answer.errors} times in a row{about}"
    return ""
