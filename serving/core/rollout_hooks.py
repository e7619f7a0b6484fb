"""The web services that a plan names, as questions whose answers have a key each."""

from __future__ import annotations

from typing import Final

from serving.core.rollout_spec import Gate, Webhook
from serving.core.rollout_types import Hook, ProviderState, Rollout

_GATE_TIMEOUT_S: Final = 10.0


def gate_key(step: int) -> str:
    """Where `Snapshot.providers` has the answer of a step's webhook gate."""
    return f"gate:{step}"


def gate_hook(step: int, gate: Gate) -> Hook:
    """A step's webhook gate."""
    return Hook(gate_key(step), gate.url, _GATE_TIMEOUT_S, gate.secret_env)


def webhooks(rollout: Rollout, event: str) -> tuple[Webhook, ...]:
    """The plan's webhooks of one event."""
    return tuple(w for w in rollout.spec.webhooks if w.event == event)


def hooks(rollout: Rollout, event: str) -> tuple[Hook, ...]:
    """The same, in the same order, as they are asked now."""
    # One key a step: the yes to one step is no yes to the next.
    place = f"{event}:{rollout.step + 1}"
    return tuple(
        Hook(f"{place}:{i}", w.url, w.timeout_s, w.secret_env)
        for i, w in enumerate(webhooks(rollout, event))
    )


def so_far(answer: ProviderState | None) -> str:
    """What a web service that has not said yes did say, in brackets; "" where that is nothing."""
    if answer is None or answer.outcome == "ok" or not answer.message:
        return ""
    return f" (so far: {answer.message})"
