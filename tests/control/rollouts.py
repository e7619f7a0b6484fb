"""Rollouts as tests of the controller's outer side need them."""

from dataclasses import replace
from typing import Any

from serving.core.rollout import new_rollout
from serving.core.rollout_spec import Analysis, RolloutSpec, Step, Trigger, Webhook
from serving.core.rollout_types import Rollout, State


def rollout(
    *triggers: Trigger,
    webhooks: tuple[Webhook, ...] = (),
    state: State = State.OBSERVING,
    step: int = 0,
    **changes: Any,
) -> Rollout:
    spec = RolloutSpec(
        steps=(Step(weight=5, hold_s=60), Step(weight=50, hold_s=60)),
        analysis=Analysis(triggers=triggers),
        webhooks=webhooks,
    )
    new = new_rollout(
        "r-1",
        model="digits",
        stable=("1", "sha256:a"),
        canary=("2", "sha256:b"),
        spec=spec,
        salt="s",
        actor="ann",
        reason="a new version",
        now=1000.0,
    )
    return replace(new, state=state, step=step, **changes)
