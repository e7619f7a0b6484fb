"""What takes a version back: every trigger of a plan, judged by a rollout's counts.

One function a kind, `KINDS` is their table: a new kind is a new row. Each looks at frozen data and
returns a `Verdict` that has its numbers and says in a sentence how they led to it.

Kinds with a weight bet against "the canary is no worse than tolerated" and fail when their e-value
reaches 1/(weight·α): looked at after every tick, in any order, all of them together fail a healthy
version with a chance of at most α. They pass, for steps that require it, when the e-value of the
opposite claim reaches 1/β, and hold while neither is so. The other kinds are hard: what they count
does not happen to a healthy version, or somebody else decides it.

In the bake there is no stable beside the canary. Errors, latency and labels are then held against
what stable did before, with a wide tolerance: `serving.core.one_arm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Final

from serving.core.cost_trigger import cost
from serving.core.evidence import (
    log_average,
    log_e_bounded,
    log_e_bounded_pass,
)
from serving.core.gpu_triggers import gpu_health, gpu_memory_headroom, oom
from serving.core.hard_triggers import breaker, crash_loop, provider, slo_burn
from serving.core.one_arm import BASELINE, Event, Tolerance, Watch, parts, spent
from serving.core.rollout_baseline import MIN_ANSWERS, latency_bounds, stable_so_far
from serving.core.rollout_counts import (
    LATENCY_BOUNDS,
    NOTHING,
    ArmCountsRow,
    Tally,
)
from serving.core.rollout_spec import Trigger, TriggerKind
from serving.core.rollout_types import Epoch, Outcome, Rollout, Snapshot, Verdict
from serving.core.two_arms import Comparison, Count, Null
from serving.core.verdicts import (
    Finding,
    failed_of,
    hold,
    judge,
    milliseconds,
    out_of,
    percent,
    verdict,
)

# A version that is half as slow again may leave the tail as it is. So latency has a second bound,
# near the median, where stable itself is often: there only a clearly larger share counts.
BODY: Final = Null(r0=1.5, delta=0.05)
# What is bet on shares of pairs: small ones; to pass, smaller still.
DISAGREEING: Final = (0.5, 5.0)
_AGREEING: Final = (0.5, 50.0)
MARGINS: Final[Mapping[TriggerKind, float]] = {
    "errors": 0.01,
    "latency": 0.05,
    "labels": 0.05,
}
"""How much more than stable's share of requests may fail, be slow, or be wrong, in the bake."""

Judge = Callable[[Trigger, Rollout, Snapshot], Verdict]


def evaluate(rollout: Rollout, snapshot: Snapshot) -> tuple[Verdict, ...]:
    """A verdict of every trigger of the rollout's plan, in the plan's order. Never raises."""
    return tuple(_verdict(t, rollout, snapshot) for t in rollout.spec.analysis.triggers)


def _verdict(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    try:
        return KINDS[trigger.kind](trigger, rollout, snapshot)
    except Exception as error:
        # A fault of this code must not keep the other triggers from taking a version back.
        fault = f"{type(error).__name__}: {error}"
        return verdict(trigger, Outcome.UNKNOWN, f"could not be judged ({fault}): holds")


def _errors(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Requests, or users, that an arm failed, against stable's at the same time."""
    both = Comparison(rollout.epochs, snapshot.counts, _failures, assigned=True)
    units = rollout.spec.assignment.units
    facts = f"canary failed {out_of(both.canary, units)}, stable {out_of(both.stable)}"
    found = _weigh([(both, _null(trigger))], rollout, units, facts)
    watch = _watch(trigger, rollout, snapshot, lambda row: row.attempts)
    return judge(trigger, rollout.spec.analysis, _with_bake(found, watch, units=units))


def _latency(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Answers slower than bounds that stable's own latency set: in the tail, and in the body."""
    nulls = (_null(trigger), BODY)
    bets = [
        (Comparison(rollout.epochs, snapshot.counts, _slower_than(i), assigned=False), null)
        for i, null in enumerate(nulls)
    ]
    frozen = [e.latency_bounds for e in rollout.epochs if e.latency_bounds]
    if not frozen:
        return hold(trigger, _without_bounds(trigger, stable_so_far(snapshot.counts)))
    *compared, alone = frozen[-1]
    facts = "; ".join(
        f"longer than {milliseconds(LATENCY_BOUNDS[bound])} took "
        f"{out_of(both.canary, 'canary answers')} and {out_of(both.stable, 'of stable')}"
        for (both, _), bound in zip(bets, compared, strict=True)
    )
    found = _weigh(bets, rollout, "answers", facts)
    watch = _watch(trigger, rollout, snapshot, lambda row: row.slow(alone))
    beyond = f"longer than {milliseconds(LATENCY_BOUNDS[alone])} took "
    return judge(trigger, rollout.spec.analysis, _with_bake(found, watch, beyond))


def _without_bounds(trigger: Trigger, stable: ArmCountsRow) -> str:
    """Why latency has no bounds yet, or cannot have any."""
    if stable.latency.total < MIN_ANSWERS:
        n = stable.latency.total
        return f"waits for {MIN_ANSWERS} answers of stable to judge by, {n} so far"
    if latency_bounds(stable, trigger.floor_s) is None:
        return (
            "stable is too slow to judge by, its 99th percentile is "
            f"{stable.latency.quantile(0.99):.3g} s: a bound would lie beyond "
            f"{LATENCY_BOUNDS[-1]:.0f} s, where latencies are no longer told apart: holds"
        )
    return "judged from the first step on, which sets its bounds: holds"


def _labels(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Answers that their late labels proved wrong."""
    both = Comparison(rollout.epochs, snapshot.counts, _wrong, assigned=False)
    arms = [arm for c in snapshot.counts.values() for arm in (c.stable, c.canary)]
    labelled = any(row.labels[0] for arm in arms for row in arm.values())
    if rollout.spec.feedback is None and not labelled:
        return hold(trigger, "the plan has no feedback, so labels are not taken: holds")
    facts = (
        f"canary was wrong in {out_of(both.canary, 'labelled answers')}, "
        f"stable in {out_of(both.stable)}"
    )
    found = _weigh([(both, _null(trigger))], rollout, "labelled answers", facts)
    watch = _watch(trigger, rollout, snapshot, _mislabelled)
    return judge(trigger, rollout.spec.analysis, _with_bake(found, watch, "wrong "))


def _drift(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Predictions that the canary gives more often than stable, in any of stable's frequent bins.

    What becomes rarer makes something else more frequent, so one direction is enough.
    """
    names = list(dict.fromkeys(name for e in rollout.epochs for name in e.drift_bins or ()))
    if not names:
        return hold(trigger, "waits for predictions of stable to judge by")
    bins = {name: _predicted(name) for name in names} | {"any other": _predicted(None)}
    bets = [
        (Comparison(rollout.epochs, snapshot.counts, count, assigned=False), _null(trigger))
        for count in bins.values()
    ]
    planned = _planned(rollout)
    grown = [both.log_e(null, planned) for both, null in bets]
    most = max(range(len(bets)), key=grown.__getitem__)
    label, (both, _) = list(bins)[most], bets[most]
    facts = (
        f"canary predicted {label} in {out_of(both.canary, 'answers')}, "
        f"stable in {out_of(both.stable)}"
    )
    return judge(
        trigger,
        rollout.spec.analysis,
        Finding(
            log_e=log_average(grown),
            log_e_pass=min(b.log_e_pass(null) for b, null in bets),
            canary=both.canary,
            stable=both.stable,
            clusters=both.clusters,
            units="answers",
            facts=facts,
        ),
    )


def _disagreement(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Shadow pairs whose answers differ, against a bound.

    Where answers are not compared, only those that the canary failed are known: no evidence that
    it agrees.
    """
    shadow = rollout.spec.shadow
    compared = shadow is None or shadow.compare.kind != "none"
    n = sum(c.pairs for c in snapshot.counts.values())
    if not n and (shadow is None or not compared):
        return hold(trigger, "the plan compares no shadow traffic: holds")
    k = sum(c.disagreements for c in snapshot.counts.values())
    tolerated = f"(tolerated: {percent(trigger.q0)})"
    facts = (
        f"canary disagreed with stable in {out_of((n, k), 'shadow pairs')} {tolerated}"
        if compared
        else f"canary failed {out_of((n, k), 'copies')} {tolerated}, their answers are not compared"
    )
    return judge(
        trigger,
        rollout.spec.analysis,
        Finding(
            log_e=log_e_bounded(k, n, trigger.q0, *DISAGREEING),
            log_e_pass=log_e_bounded_pass(k, n, trigger.q0, *_AGREEING) if compared else -inf,
            canary=(n, k),
            stable=(0, 0),
            clusters=k,
            units="shadow pairs" if compared else "copies",
            facts=facts,
        ),
    )


KINDS: Final[Mapping[TriggerKind, Judge]] = {
    "errors": _errors,
    "latency": _latency,
    "disagreement": _disagreement,
    "drift": _drift,
    "labels": _labels,
    "cost": cost,
    "crash_loop": crash_loop,
    "oom": oom,
    "gpu_health": gpu_health,
    "gpu_memory_headroom": gpu_memory_headroom,
    "breaker": breaker,
    "slo_burn": slo_burn,
    "promql": provider,
    "webhook": provider,
}
"""How a trigger of each kind judges."""


def _weigh(
    bets: Sequence[tuple[Comparison, Null]], rollout: Rollout, units: str, facts: str
) -> Finding:
    """Average the bets; then set each replica of the canary aside, and believe the least of it."""
    planned = _planned(rollout)
    whole = log_average([both.log_e(null, planned) for both, null in bets])
    without = {
        replica: log_average([both.log_e_without(replica, null, planned) for both, null in bets])
        for replica in bets[0][0].witnesses
    }
    worst = min(without, key=without.__getitem__) if without else ""
    doubted = bool(worst) and without[worst] < whole
    return Finding(
        log_e=without[worst] if doubted else whole,
        log_e_pass=min(both.log_e_pass(null) for both, null in bets),
        canary=bets[0][0].canary,
        stable=bets[0][0].stable,
        clusters=max(both.clusters for both, _ in bets),
        units=units,
        facts=facts,
        alone=(worst, whole) if doubted else None,
    )


def tolerance(trigger: Trigger, alpha: float) -> Tolerance:
    """What a trigger of a kind in `MARGINS` tolerates in the bake."""
    # Of a trigger without a share nothing fails, but it is recorded.
    risk = BASELINE * (trigger.weight or 1.0) * alpha
    return Tolerance(_null(trigger), MARGINS[trigger.kind], risk)


def _watch(trigger: Trigger, rollout: Rollout, snapshot: Snapshot, event: Event) -> Watch:
    """What the canary did alone, held against what stable did before."""
    spec = rollout.spec
    return Watch(
        rollout.epochs,
        snapshot.counts,
        event,
        tolerance(trigger, spec.analysis.alpha),
        last=len(spec.steps),
        planned=parts(spec.bake.duration_s),
    )


def _with_bake(found: Finding, watch: Watch, events: str = "failed ", units: str = "") -> Finding:
    """The comparison's finding, with the bake's as its smaller part."""
    replica, compared = found.alone or ("", found.log_e)
    whole = spent(compared, watch.log_e)
    least = watch.log_e
    if without := watch.without:
        worst = min(without, key=without.__getitem__)
        if without[worst] < least:
            replica, least = worst, without[worst]
    log_e = spent(found.log_e, least)
    n, k = watch.canary
    facts = found.facts
    if n:
        allowed = percent(watch.tolerated) if watch.tolerated < 1 else "anything, stable did little"
        facts += f"; in the bake {events}{failed_of((n, k), units)}, tolerated: {allowed}"
    return replace(
        found,
        log_e=log_e,
        canary=(found.canary[0] + n, found.canary[1] + k),
        clusters=found.clusters + watch.clusters,
        facts=facts,
        alone=(replica, whole) if log_e < whole else None,
    )


def _planned(rollout: Rollout) -> int:
    """Steps with both arms open: at each a canary may turn bad."""
    return sum(0 < step.weight < 100 for step in rollout.spec.steps)


def _null(trigger: Trigger) -> Null:
    return Null(trigger.r0, trigger.delta)


def _failures(_: Epoch, row: ArmCountsRow) -> Tally:
    return row.failures


def _wrong(_: Epoch, row: ArmCountsRow) -> Tally:
    return _mislabelled(row)


def _mislabelled(row: ArmCountsRow) -> Tally:
    return (*row.labels, *row.labels)


def _slower_than(which: int) -> Count:
    def count(epoch: Epoch, row: ArmCountsRow) -> Tally:
        return row.slow(epoch.latency_bounds[which]) if epoch.latency_bounds else NOTHING

    return count


def _predicted(name: str | None) -> Count:
    """Predictions of one name; without one, of none that is a bin."""

    def count(epoch: Epoch, row: ArmCountsRow) -> Tally:
        if not epoch.drift_bins or not (name is None or name in epoch.drift_bins):
            return NOTHING
        return row.predicted({name}) if name else row.predicted(epoch.drift_bins, other=True)

    return count
