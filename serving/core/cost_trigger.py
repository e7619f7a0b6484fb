"""The trigger on cost per inference: a gauge, and a verdict where both arms are of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp, fsum, log1p
from typing import Final

from serving.core.evidence import log_e_means
from serving.core.rollout_costs import EQUAL, Spent, independent, log_ratios, spent, uses
from serving.core.rollout_counts import ARMS, ArmName
from serving.core.rollout_facts import CostWindow
from serving.core.rollout_spec import Trigger
from serving.core.rollout_types import Rollout, Snapshot, Verdict
from serving.core.two_arms import witnesses
from serving.core.verdicts import Finding, hold, judge

MIN_WINDOWS: Final = 8
"""Fewer say nothing of how much costs scatter."""


def cost(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Direct cost per inference, of the canary against stable's at the same time."""
    stable, canary = (_spent(rollout, snapshot, arm) for arm in ARMS)
    if not (canary.inferences and stable.inferences and canary.ns and stable.ns):
        return hold(trigger, "waits for answers of both versions at the same time")
    tolerated = f"tolerated: {1 + trigger.tolerance:.3g}"
    facts = f"canary {_said(canary)}, stable {_said(stable)}: {_ratio(canary, stable)}"
    if unpriced := canary.unpriced or stable.unpriced:
        return hold(trigger, f"{facts}; a gauge only: the price of replica {unpriced} is not known")
    windows = independent(snapshot.costs.closed, MIN_WINDOWS)
    if len(windows) < MIN_WINDOWS:
        return hold(trigger, f"{facts} ({tolerated}); a gauge only: {_why(rollout, len(windows))}")
    return _judged(trigger, rollout, windows, f"{facts} overall")


def _judged(
    trigger: Trigger, rollout: Rollout, windows: Sequence[CostWindow], facts: str
) -> Verdict:
    ratios, tolerated = log_ratios(windows), log1p(trigger.tolerance)
    whole = log_e_means(ratios, tolerated)
    n = sum(inferences for w in windows for _, inferences in w.canary.values())
    mean = exp(fsum(ratios) / len(ratios))
    without = {r: log_e_means(log_ratios(windows, r), tolerated) for r in _witnesses(windows)}
    worst = min(without, key=without.__getitem__) if without else ""
    doubted = bool(worst) and without[worst] < whole
    found = Finding(
        log_e=without[worst] if doubted else whole,
        log_e_pass=log_e_means([-ratio for ratio in ratios], -tolerated),
        canary=(n, 0),
        stable=(0, 0),
        clusters=n,
        units="inferences",
        facts=f"{facts}; at equal size {mean:.3g} times in {len(windows)} windows "
        f"(tolerated: {1 + trigger.tolerance:.3g})",
        alone=(worst, whole) if doubted else None,
    )
    # Dollars are no events out of units: its numbers are in the sentence.
    return replace(judge(trigger, rollout.spec.analysis, found), canary=(0, 0), baseline=(0, 0))


def _witnesses(windows: Sequence[CostWindow]) -> tuple[str, ...]:
    inferences: dict[str, float] = {}
    for window in windows:
        for replica, (_, n) in window.canary.items():
            inferences[replica] = inferences.get(replica, 0.0) + n
    return witnesses(inferences)


def _spent(rollout: Rollout, snapshot: Snapshot, arm: ArmName) -> Spent:
    """Of the epochs in which both arms were open."""
    numbers = (e.epoch for e in rollout.epochs if 0 < e.weight < 1)
    counts = [snapshot.counts[e] for e in numbers if e in snapshot.counts]
    return spent(uses(c.replicas(arm) for c in counts), snapshot.prices)


def _said(arm: Spent) -> str:
    each = f"{arm.ns / arm.inferences / 1e6:.3g} ms of its device"
    usd = arm.usd_per_1000
    return (
        f"took {each} an inference" if usd is None else f"cost ${usd:.3g} per 1,000 ({each} each)"
    )


def _ratio(canary: Spent, stable: Spent) -> str:
    costs = canary.usd_per_1000, stable.usd_per_1000
    if costs[0] is not None and costs[1]:
        return f"{costs[0] / costs[1]:.3g} times"
    return f"{canary.ns / canary.inferences / (stable.ns / stable.inferences):.3g} times"


def _why(rollout: Rollout, windows: int) -> str:
    """Why it is not judged."""
    if windows or rollout.weight == EQUAL:
        return f"{windows} of {MIN_WINDOWS} windows in which both versions were of equal size"
    why = (
        "a small share runs in small batches, which cost more with any version, and there is no "
        "baseline of the canary's size"
    )
    if any(step.weight == 100 * EQUAL for step in rollout.spec.steps):
        return f"{why} before the step of 50 %"
    return f"{why}: this plan has no step of 50 %"
