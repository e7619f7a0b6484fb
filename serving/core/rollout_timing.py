"""How long each part of a plan takes at some traffic, if nothing speaks against the new version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from serving.core.rollout_spec import RolloutSpec, Step, TimeoutAction

_COMPARED_KINDS: Final = frozenset({"errors", "latency"})
_PAIRED_KINDS: Final = _COMPARED_KINDS | {"disagreement"}


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step is expected to take, or the shadow, which is `step` -1.

    `seconds`: its hold, or how long the units that it `needs` (requests, or pairs) take where that
    is longer. None, with the `timeout` that follows, where traffic is too low: after the hold and
    `on_insufficient_data.after` the plan does something else.
    """

    step: int
    needs: int
    seconds: float | None
    timeout: TimeoutAction | None = None


def units_needed(spec: RolloutSpec, step: Step) -> int:
    """The requests, or users, that the canary must have had for the step to end."""
    return bake_units_needed(spec) if step.weight > 0 else 0


def bake_units_needed(spec: RolloutSpec) -> int:
    """The requests, or users, that the canary must have had by the end of the bake, in all."""
    compared = any(t.kind in _COMPARED_KINDS for t in spec.analysis.triggers)
    return spec.analysis.min_units if compared else 0


def pairs_needed(spec: RolloutSpec) -> int:
    """The pairs that the shadow must have compared at its end, where no step follows to tell."""
    paired = any(t.kind in _PAIRED_KINDS for t in spec.analysis.triggers)
    if spec.shadow is None or spec.steps or not paired:
        return 0
    return min(spec.analysis.min_units, spec.shadow.min_pairs)


def step_times(spec: RolloutSpec, requests_per_s: float) -> tuple[StepTime, ...]:
    """The shadow, if there is one, and the steps, in order. Where users stick, by first requests.

    `require_pass`, gates and providers, which nobody can foretell, take longer.
    """
    steps = tuple(_step(spec, i, step, requests_per_s) for i, step in enumerate(spec.steps))
    shadow = spec.shadow
    if shadow is None:
        return steps
    pairs_per_s = requests_per_s * shadow.percent / 100
    enough = _seconds(shadow.min_pairs, pairs_per_s)
    needs = 0 if spec.analysis.dry_run else pairs_needed(spec)
    if (least := _seconds(needs, pairs_per_s)) > shadow.max_duration_s:
        return (_waited(spec, StepTime(-1, needs, least), shadow.max_duration_s), *steps)
    return (StepTime(-1, shadow.min_pairs, min(enough, shadow.max_duration_s)), *steps)


def longest(spec: RolloutSpec, step: Step) -> float:
    """Seconds after which a step that lacks evidence ends in one way or another."""
    return step.hold_s + spec.analysis.on_insufficient_data.after_s


def span(seconds: float) -> str:
    """A duration for a person: "45 s", "2 min", "1 h 30 min"."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _step(spec: RolloutSpec, index: int, step: Step, requests_per_s: float) -> StepTime:
    needs = 0 if spec.analysis.dry_run else units_needed(spec, step)
    seconds = max(step.hold_s, _seconds(needs, requests_per_s * step.weight / 100))
    return _waited(spec, StepTime(index, needs, seconds), step.hold_s)


def _waited(spec: RolloutSpec, time: StepTime, hold_s: float) -> StepTime:
    """What becomes of it if what it needs takes longer than the plan waits after its hold."""
    rule = spec.analysis.on_insufficient_data
    over = hold_s + rule.after_s
    if time.seconds is None or time.seconds <= over:
        return time
    seconds = over if rule.action == "proceed" else None
    return StepTime(time.step, time.needs, seconds, rule.action)


def _seconds(units: float, per_s: float) -> float:
    if units <= 0:
        return 0.0
    return units / per_s if per_s > 0 else float("inf")
