"""Triggers that bet nothing: what they count does not happen to a healthy version.

A crash loop, a gateway's breaker, errors that burn the objective's budget many times too fast, and
what somebody else says.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Final

from serving.core.clusters import design_effect
from serving.core.evidence import log_e_bounded
from serving.core.one_arm import FACTOR, LARGE
from serving.core.rollout_counts import NOTHING, Sample, recent
from serving.core.rollout_spec import Trigger
from serving.core.rollout_types import Outcome, Rollout, Snapshot, Verdict
from serving.core.verdicts import ENDS, failed_of, hold, percent, power, rate, times, verdict

OWN_FAULT: Final = 2.0
"""A canary fails on its own account only at this many times stable's rate or more."""
_SHORT_WINDOW: Final = 0.2
_BREAKER_WINDOWS_S: Final = (3.0, 10.0, 30.0, 100.0)
# What is bet on the share of failures above the bound.
_BURNING: Final = (0.5, 5.0)
_ALMOST_ALL: Final = 0.99


def crash_loop(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Restarts of the canary's replicas."""
    since = snapshot.now - trigger.window_s
    all_of_them = {*rollout.restarts, *snapshot.restarts}
    restarts = sum(since < at <= snapshot.now for at in all_of_them)
    outcome = Outcome.FAIL if restarts >= trigger.failures else Outcome.PASS
    sentence = (
        f"the canary's replicas restarted {times(restarts)} in the last "
        f"{trigger.window_s:g} s, {trigger.failures} are too many: {ENDS[outcome]}"
    )
    return verdict(trigger, outcome, sentence)


def breaker(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """A gateway stopped sending to the canary on its own, and stable was not failing likewise.

    What opened it must be in the counts: requests that could not have gone to stable are not.
    """
    breakers = snapshot.breakers
    if not breakers.open or breakers.opened < trigger.failures:
        sentence = f"no breaker is open, {times(breakers.opened)} so far: passes"
        return verdict(trigger, Outcome.PASS, sentence)
    needed = rollout.spec.breaker_failures
    burst = _burst(snapshot.history, needed)
    canary, stable = burst.canary[:2], burst.stable[:2]
    units = rollout.spec.assignment.units
    outcome, why = Outcome.FAIL, "fails"
    if canary[1] < needed:
        outcome, why = Outcome.HOLD, f"{needed} failures must count: holds"
    elif rate(burst.stable) * OWN_FAULT > rate(burst.canary):
        outcome, why = Outcome.HOLD, "stable fails likewise, so it is not the version"
    sentence = (
        f"{breakers.open} gateway(s) stopped sending to the canary after "
        f"{needed} failures in a row; of late canary failed "
        f"{failed_of(canary, units)}, stable {failed_of(stable, units)}: {why}"
    )
    return verdict(trigger, outcome, sentence, canary=canary, stable=stable)


def _burst(history: Sequence[Sample], failures: int) -> Sample:
    """The shortest of the latest windows in which as many `failures` of the canary were counted.

    The breaker cuts the canary off, so the latest seconds may have none of its requests. Where no
    window has as many it is the whole rollout.
    """
    windows = (recent(history, seconds) for seconds in _BREAKER_WINDOWS_S)
    latest = history[-1] if history else Sample(0.0, NOTHING, NOTHING)
    return next((w for w in windows if w.canary[1] >= failures), latest)


def slo_burn(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Errors that use up the objective's budget many times too fast, stable's rate left aside.

    It needs no stable traffic beside it, so it watches the bake too, with as much patience as
    `one_arm` has there. If stable burnt the budget as fast in any epoch, the objective is no
    measure of the canary alone: that is left to `one_arm`. The rate must be above the bound in both
    windows, and clearly so in the long one.
    """
    history, analysis = snapshot.history, rollout.spec.analysis
    long, short = (recent(history, trigger.window_s * part) for part in (1.0, _SHORT_WINDOW))
    # Its rate of late says little when it had few requests, and nothing where it had none.
    ever = history[-1].stable if history else NOTHING
    known = [long.stable] if long.stable[0] >= analysis.min_units else []
    factor = OWN_FAULT
    if not short.stable[0]:
        factor = FACTOR
        epochs = [epoch.arm("stable").failures for epoch in snapshot.counts.values()]
        known += [failures for failures in epochs if failures[0] >= LARGE]
    stable = max([ever, *known], key=rate)
    burning = trigger.threshold * (1.0 - trigger.objective)
    bound = min(max(burning, factor * rate(stable)), _ALMOST_ALL)
    effect = float(design_effect([long.canary])[0])
    n, k, _, clusters = long.canary
    log_e = log_e_bounded(k / effect, n / effect, bound, *_BURNING)
    threshold = -log(analysis.alpha)
    outcome, why = Outcome.PASS, "passes"
    units = rollout.spec.assignment.units
    if factor == FACTOR and rate(stable) >= burning:
        why = f"stable burnt the budget too, {percent(rate(stable))} at worst: passes"
    elif n < analysis.min_units and k < trigger.failures:
        outcome, why = Outcome.HOLD, f"waits for {analysis.min_units} requests of the canary"
    elif rate(long.canary) >= bound <= rate(short.canary):
        outcome, why = Outcome.HOLD, "not decided"
        if min(k, clusters) >= trigger.failures and log_e >= threshold:
            outcome, why = Outcome.FAIL, "fails"
    sentence = (
        f"canary failed {failed_of((n, k), units)} in the last {trigger.window_s:g} s and "
        f"{failed_of(short.canary[:2], units)} in the last {trigger.window_s * _SHORT_WINDOW:g} s; "
        f"bound {percent(bound)}, evidence {power(log_e)}, threshold {power(threshold)}: {why}"
    )
    return verdict(
        trigger,
        outcome,
        sentence,
        log_e=log_e,
        threshold=threshold,
        canary=(n, k),
        stable=stable[:2],
    )


def provider(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Somebody else's opinion: bad only when it was so several times in a row."""
    state = snapshot.providers.get(trigger.name)
    if state is None:
        return hold(trigger, "has not been asked yet")
    said = f" ({state.message})" if state.message else ""
    if state.outcome == "unknown":
        sentence = f"no answer, {times(state.errors)} in a row{said}: holds"
        return verdict(trigger, Outcome.UNKNOWN, sentence)
    if state.outcome == "ok":
        return verdict(trigger, Outcome.PASS, f"answered ok{said}: passes")
    outcome = Outcome.FAIL if state.fails >= trigger.failures else Outcome.HOLD
    sentence = (
        f"answered bad {times(state.fails)} in a row{said}, "
        f"{trigger.failures} needed: {ENDS[outcome]}"
    )
    return verdict(trigger, outcome, sentence)
