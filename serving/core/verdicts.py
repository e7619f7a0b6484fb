"""How a verdict is reached and put into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, log
from typing import Final

from serving.core.evidence import log_threshold
from serving.core.rollout_counts import Tally
from serving.core.rollout_spec import Analysis, Trigger
from serving.core.rollout_types import Outcome, Verdict

_LN10: Final = log(10)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a bet has come to: logarithms of both e-values, and what they rest on.

    `alone`: the replica without which `log_e` is what it is, and what it is with it.
    `clusters`: events that came apart. `units` names what was counted; `facts` is the sentence.
    """

    log_e: float
    log_e_pass: float
    canary: tuple[int, int]
    stable: tuple[int, int]
    clusters: int
    units: str
    facts: str
    alone: tuple[str, float] | None = None


def judge(trigger: Trigger, analysis: Analysis, found: Finding) -> Verdict:
    """FAIL or PASS where the evidence reaches its threshold and there is enough of it, or HOLD."""
    threshold = log_threshold(trigger.weight, analysis.alpha)
    needed = -log(analysis.beta)
    enough = found.canary[0] >= analysis.min_units
    outcome, why = Outcome.HOLD, "not decided"
    if not enough:
        why = f"waits for {analysis.min_units} {found.units} of the canary"
    elif found.log_e >= threshold and found.clusters >= analysis.min_events:
        outcome, why = Outcome.FAIL, "fails"
    elif found.log_e >= threshold:
        why = f"waits for {analysis.min_events} events of the canary that came apart"
    elif found.alone is not None and found.alone[1] >= threshold:
        replica, whole = found.alone
        why = f"not decided: it all comes from replica {replica} ({power(whole)} with it)"
    elif found.log_e_pass >= needed:
        outcome = Outcome.PASS
        why = f"evidence that it is no worse {power(found.log_e_pass)} of {power(needed)}: passes"
    limit = power(threshold) if isfinite(threshold) else "none, as its weight is 0"
    sentence = f"{found.facts}; evidence {power(found.log_e)}, threshold {limit}: {why}"
    return verdict(
        trigger,
        outcome,
        sentence,
        log_e=found.log_e,
        threshold=threshold if isfinite(threshold) else None,
        canary=found.canary,
        stable=found.stable,
    )


def verdict(
    trigger: Trigger,
    outcome: Outcome,
    sentence: str,
    *,
    log_e: float | None = None,
    threshold: float | None = None,
    canary: tuple[int, int] = (0, 0),
    stable: tuple[int, int] = (0, 0),
) -> Verdict:
    """A trigger's verdict; its sentence begins with the trigger's name."""
    return Verdict(
        trigger=trigger.name,
        verdict=outcome,
        log_e=log_e,
        threshold=threshold,
        canary=canary,
        baseline=stable,
        sentence=f"{trigger.name}: {sentence}",
        action=trigger.action,
    )


def hold(trigger: Trigger, sentence: str) -> Verdict:
    """A verdict of a trigger that has nothing to judge by yet."""
    return verdict(trigger, Outcome.HOLD, sentence)


ENDS: Final[Mapping[Outcome, str]] = {
    Outcome.FAIL: "fails",
    Outcome.HOLD: "not decided",
    Outcome.PASS: "passes",
}
"""How a sentence ends."""


def rate(tally: Tally) -> float:
    """The share of requests with the event; 0 without requests."""
    return tally[1] / tally[0] if tally[0] else 0.0


def out_of(counted: tuple[int, int], units: str = "") -> str:
    """Units and events as "12 of 240 requests (5.0 %)"."""
    n, k = counted
    return f"{k} of {n} {units}".rstrip() + (f" ({percent(k / n)})" if n else "")


def failed_of(counted: tuple[int, int], units: str) -> str:
    """What failed at any time as "12 of 240 requests (5.0 %)", or "12 users in 240 requests (…)".

    A user counts with the first failure, while `counted` has all requests: as `attempts` are.
    """
    if units != "users":
        return out_of(counted, units)
    n, k = counted
    return f"{k} {units} in {n} requests" + (f" ({percent(k / n)})" if n else "")


def percent(share: float) -> str:
    """A share as percent, small ones with two digits."""
    number = 100 * share
    return f"{number:.2g} %" if 0 < number < 0.1 else f"{number:.1f} %"


def power(log_e: float) -> str:
    """A natural logarithm as a power of ten."""
    # + 0.0: minus zero is zero.
    return f"10^{round(log_e / _LN10, 1) + 0.0:.1f}"


def times(count: int) -> str:
    """How often, in words."""
    return "once" if count == 1 else f"{count} times"


def milliseconds(seconds: float) -> str:
    """A duration in milliseconds, three digits."""
    return f"{seconds * 1000:.3g} ms"
