"""How long a plan needs to notice which regression, at the traffic that stable has now.

An e-value's logarithm is a sum over requests, so it grows at a steady rate on average. With R
requests a second, a share ρ of them to the canary, event rates p_c and p_b, the bet λ grows by

    g(λ) = R·[ρ·p_c·log(1 + λ(1/ρ − δ)) + (1 − ρ)·p_b·log(1 − λ(r0/(1 − ρ) + δ))
              + (1 − ρ·p_c − (1 − ρ)·p_b)·log(1 − λδ)]

a second, and reaches its threshold after about (log(1/(w·α)) + log 12 + log steps) / max g(λ)
seconds: twelve bets share the capital, and so do the copies of the test that start at each step.
Here the test itself is given the counts that are expected at a time, step after step, which is the
same without the approximation of the sums. About half of all rollouts are faster. Events are taken
to befall requests independently. Where users stick to their version, and count with their first
failure, it holds for users with one request each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log1p
from typing import Final

from serving.core.evidence import (
    ArmCounts,
    Period,
    log_average,
    log_e_bounded,
    log_e_late_onset,
    log_threshold,
)
from serving.core.one_arm import spent
from serving.core.rollout_baseline import latency_bounds
from serving.core.rollout_counts import LATENCY_BOUNDS, ArmCountsRow, Histogram
from serving.core.rollout_spec import RolloutSpec, Trigger, TriggerKind
from serving.core.rollout_timing import longest, step_times
from serving.core.triggers import BODY, DISAGREEING
from serving.core.two_arms import Null

FAILING: Final = (0.01, 0.05, 0.2, 1.0)
"""Shares of requests that fail, of the regressions that `detections` asks about."""
SLOWER: Final = (1.5, 2.0, 5.0)
"""How many times as long requests take, likewise."""
DIFFERING: Final = (0.05, 0.1, 0.3)
"""Shares of answers that differ from stable's, likewise."""

_LATE: Final = 0.05
_HALVINGS: Final = 30


@dataclass(frozen=True, slots=True)
class Detection:
    """When a regression is noticed, as expected.

    `regression` says in words what it is, `trigger` is the one that notices it. `seconds` is from
    its beginning, and None where the plan's steps are over before. It is noticed in `step` (from 0;
    -1 is the shadow). `bad_answers`: how many requests it hits until then, shielded ones included.
    """

    regression: str
    trigger: str
    seconds: float | None
    step: int | None
    bad_answers: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is known of stable: its `requests_per_s` (> 0) and its `counts` of late.

    `canary_replicas`: how many the canary will have. A verdict must hold without any one of them.
    """

    requests_per_s: float
    counts: ArmCountsRow
    canary_replicas: int = 1


@dataclass(frozen=True, slots=True)
class Regression:
    """A two-arm event: what is tolerated of it, and how often it befalls each arm's units.

    Until the step `since` the canary is as stable.
    """

    null: Null
    canary: float
    stable: float
    since: int = 0


def detections(spec: RolloutSpec, traffic: Traffic) -> tuple[Detection, ...]:
    """What the plan would notice of `FAILING`, `SLOWER` and `DIFFERING`, trigger by trigger.

    What stable has not enough counts for, or the plan no trigger, is left out.
    """
    return tuple(
        detection
        for trigger in spec.analysis.triggers
        if trigger.kind in _KINDS and trigger.weight > 0
        for detection in _KINDS[trigger.kind](spec, traffic, trigger)
    )


def seconds_to_detect(
    spec: RolloutSpec,
    traffic: Traffic,
    trigger: Trigger,
    regressions: Sequence[Regression],
) -> float | None:
    """Seconds from the start of the step in which they begin until a trigger notices regressions.

    Of several regressions (the same version, looked at in several ways) evidence is averaged.
    """
    phases = _phases(spec, traffic)
    planned = sum(0 < step.weight < 100 for step in spec.steps)
    threshold = log_threshold(trigger.weight, spec.analysis.alpha)
    since = regressions[0].since
    before = 0.0
    for last, phase in enumerate(phases):
        if phase.step < since:
            continue

        def noticed(seconds: float, last: int = last) -> bool:
            held = [*((p, p.hold_s) for p in phases[:last]), (phases[last], seconds)]
            log_es, most = [], 0.0
            for regression in regressions:
                steps = [[_expected(traffic, regression, p, t)] for p, t in held]
                null = regression.null
                log_es.append(log_e_late_onset(steps, planned, null.r0, null.delta))
                most = max(most, sum(period.canary.k for (period,) in steps))
            units = traffic.requests_per_s * sum(p.weight * t for p, t in held)
            return spent(log_average(log_es)) >= threshold and _guarded(spec, units, most)

        seconds = _first(noticed, phase.hold_s)
        if seconds is not None:
            return before + seconds
        before += phase.hold_s
    return None


def seconds_to_break(
    spec: RolloutSpec, traffic: Traffic, share: float, since: int = 0
) -> float | None:
    """Seconds until as many failures in a row are expected as open one gateway's breaker.

    With a share p failing, a run of m comes after (p^-m − 1) / (1 − p) requests on average.
    """
    run = spec.breaker_failures
    needed = run if share == 1 else (share**-run - 1) / (1 - share)
    before = 0.0
    for phase in _phases(spec, traffic):
        if phase.step < since:
            continue
        to_canary = traffic.requests_per_s * phase.weight
        if needed <= to_canary * phase.hold_s:
            return before + needed / to_canary
        needed -= to_canary * phase.hold_s
        before += phase.hold_s
    return None


@dataclass(frozen=True, slots=True)
class _Phase:
    """A step with both arms open; `weight` is the canary's, 0 to 1.

    `hold_s` is how long the step takes at the traffic that there is.
    """

    step: int
    weight: float
    hold_s: float


def _phases(spec: RolloutSpec, traffic: Traffic) -> list[_Phase]:
    """Up to the step in which the rollout comes to a halt for want of traffic."""
    phases = []
    for time in step_times(spec, traffic.requests_per_s):
        if time.step < 0:
            continue
        step = spec.steps[time.step]
        if 0 < step.weight < 100:
            held = longest(spec, step) if time.seconds is None else time.seconds
            phases.append(_Phase(time.step, step.weight / 100, held))
        if time.seconds is None:
            break
    return phases


def _errors(spec: RolloutSpec, traffic: Traffic, trigger: Trigger) -> Iterator[Detection]:
    counts = traffic.counts
    stable = counts.failed / counts.requests if counts.requests else 0.0
    last = max((phase.step for phase in _phases(spec, traffic)), default=0)
    asked = dict.fromkeys([*((share, 0) for share in FAILING), (_LATE, last)])
    for share, since in asked:
        if share > stable:
            yield _failing(spec, traffic, trigger, share, stable, since)


def _failing(
    spec: RolloutSpec,
    traffic: Traffic,
    trigger: Trigger,
    share: float,
    stable: float,
    since: int,
) -> Detection:
    regression = Regression(Null(trigger.r0, trigger.delta), share, stable, since)
    ways = {trigger.name: seconds_to_detect(spec, traffic, trigger, [regression])}
    for breaker in spec.analysis.triggers:
        if breaker.kind == "breaker":
            ways[breaker.name] = seconds_to_break(spec, traffic, share, since)
    # The trigger itself comes first, so it is named where nothing notices.
    name = min(ways, key=lambda way: (ways[way] is None, ways[way] or 0.0))
    late = f" from step {since + 1} on" if since else ""
    words = f"{share:.0%} of requests fail{late}"
    return _detection(spec, traffic, words, name, ways[name], share, since)


def _latency(spec: RolloutSpec, traffic: Traffic, trigger: Trigger) -> Iterator[Detection]:
    bounds = latency_bounds(traffic.counts, trigger.floor_s)
    if bounds is None:
        return
    nulls = (Null(trigger.r0, trigger.delta), BODY)
    for factor in SLOWER:
        regressions = [
            Regression(
                null,
                canary=_slower(traffic.counts.latency, bound, factor),
                stable=_slower(traffic.counts.latency, bound, 1.0),
            )
            for null, bound in zip(nulls, bounds[: len(nulls)], strict=True)
        ]
        seconds = seconds_to_detect(spec, traffic, trigger, regressions)
        words = f"every request takes {factor:g} times as long"
        yield _detection(spec, traffic, words, trigger.name, seconds, 1.0, 0)


def _disagreement(spec: RolloutSpec, traffic: Traffic, trigger: Trigger) -> Iterator[Detection]:
    shadow = spec.shadow
    if shadow is None or shadow.compare.kind == "none" or not shadow.percent:
        return
    per_s = traffic.requests_per_s * shadow.percent / 100
    threshold = log_threshold(trigger.weight, spec.analysis.alpha)
    until = min(shadow.max_duration_s, shadow.min_pairs / per_s)
    for share in DIFFERING:
        if share <= trigger.q0:
            continue

        def noticed(seconds: float, share: float = share) -> bool:
            n = per_s * seconds
            log_e = log_e_bounded(share * n, n, trigger.q0, *DISAGREEING)
            return log_e >= threshold and _guarded(spec, n, share * n)

        found = _first(noticed, until)
        words = f"{share:.0%} of answers differ from stable's"
        # A client gets no answer of a shadow, so none is bad.
        yield Detection(words, trigger.name, found, None if found is None else -1, 0.0)


_KINDS: Final[
    Mapping[TriggerKind, Callable[[RolloutSpec, Traffic, Trigger], Iterator[Detection]]]
] = {"errors": _errors, "latency": _latency, "disagreement": _disagreement}


def _detection(
    spec: RolloutSpec,
    traffic: Traffic,
    words: str,
    trigger: str,
    seconds: float | None,
    share: float,
    since: int,
) -> Detection:
    """With the step that it is noticed in, and all bad answers till then, or of the whole plan."""
    bad, left, step = 0.0, seconds, None
    for phase in _phases(spec, traffic):
        if phase.step < since:
            continue
        held = phase.hold_s if left is None else min(left, phase.hold_s)
        bad += traffic.requests_per_s * phase.weight * held * share
        if left is not None:
            left -= held
            if left <= 0:
                step = phase.step
                break
    return Detection(words, trigger, seconds, step, bad)


def _expected(traffic: Traffic, regression: Regression, phase: _Phase, seconds: float) -> Period:
    """What both arms are expected to count, less one of several replicas of the canary."""
    replicas = traffic.canary_replicas
    weight = phase.weight * (replicas - 1) / replicas if replicas > 1 else phase.weight
    rest = 1 - phase.weight
    canary, stable = (traffic.requests_per_s * part * seconds for part in (weight, rest))
    rate = regression.canary if phase.step >= regression.since else regression.stable
    return Period(
        rho=weight / (weight + rest),
        canary=ArmCounts(canary, canary * rate),
        baseline=ArmCounts(stable, stable * regression.stable),
    )


def _guarded(spec: RolloutSpec, units: float, events: float) -> bool:
    return units >= spec.analysis.min_units and events >= spec.analysis.min_events


def _first(noticed: Callable[[float], bool], until: float) -> float | None:
    """The first time up to `until` from which on it is noticed: evidence only grows, once it does.

    (The logarithm of a mean of exponentials of lines is convex, and it starts below.)
    """
    if not noticed(until):
        return None
    early, late = 0.0, until
    for _ in range(_HALVINGS):
        middle = (early + late) / 2
        if noticed(middle):
            late = middle
        else:
            early = middle
    return late


def _slower(latency: Histogram, bound: int, factor: float) -> float:
    """The share of latencies that are slower than a bound once multiplied by `factor`."""
    steps = round(log1p(factor - 1) / log1p(LATENCY_BOUNDS[1] / LATENCY_BOUNDS[0] - 1))
    return latency.slower(bound - steps) / latency.total
