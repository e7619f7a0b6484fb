"""The hour of bake after the default plan: healthy canaries, and faults that begin in its midst.

A bake is asked each second, by errors, latency and the SLO burn. No stable answers beside it, so
what makes both versions worse at the same time is blamed on the canary: "day" is the usual drift of
a day (errors up and down by a factor of three, latency by 28 %), "diurnal" the same within an hour.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import numpy as np

from benchmarks.rollouts import draws, simulate, slo_burn, traffic
from benchmarks.rollouts.cells import Array, Cell, Fault, Plan, Scenario, default_ramp
from benchmarks.rollouts.detection import quantiles
from benchmarks.rollouts.false_rollbacks import upper_bound
from benchmarks.rollouts.traffic import EVENTS, NEVER, STABLE, Counts
from serving.core.evidence import log_threshold
from serving.core.one_arm import BAKE, Tolerance, Watch, parts
from serving.core.rollout_counts import ArmCountsRow, EpochCounts
from serving.core.rollout_spec import Step, Trigger
from serving.core.rollout_types import Epoch
from serving.core.triggers import tolerance

HOUR_S: Final = 3600
ONSET_S: Final = 1920
RATES: Final = (10.0, 200.0, 2000.0)
BASE_ERRORS: Final = (0.001, 0.005, 0.02)
SCENARIOS: Final[tuple[Scenario, ...]] = ("independent", "batches", "sticky", "day", "diurnal")
FAULTS: Final = {
    **{f"errors × {x:g}": Fault(errors=x) for x in (10, 20, 50, 100)},
    **{f"latency × {x:g}": Fault(latency=x) for x in (2, 3, 5)},
}
_EVENT: Final = {"errors": "errors", "latency": "alone"}
_CHUNK: Final = 50
# The ceiling holds but for a rate that differs from part to part.
_MARGIN: Final = 2.0
_LARGEST: Final = 600.0
_PARTS: Final = parts(HOUR_S)
_PART_S: Final = HOUR_S // _PARTS


def measure(scenarios: Collection[str], rollouts: int, seed: int) -> list[dict[str, Any]]:
    """One row a cell: how many bakes were ended, and how soon; progress goes to stderr."""
    rows = []
    for name, cell in _cells():
        if cell.scenario not in scenarios:
            continue
        fired = _run(cell, rollouts, seed)
        caught, at = np.isfinite(fired.at), fired.at.min(axis=0)
        row = {
            "canary": name,
            "scenario": cell.scenario,
            "rate": cell.rate,
            "base_error": cell.base_error,
            "rollouts": rollouts,
            "ended": int(caught.any(axis=0).sum()),
            "upper": upper_bound(int(caught.any(axis=0).sum()), rollouts),
            "delay_s": quantiles(at),
            # Each for itself: of some several would have ended them.
            "by_trigger": dict(zip(fired.triggers, caught.sum(axis=1).tolist(), strict=True)),
        }
        rows.append(row)
        print(f"bake: {name:<14} {cell.name:<24} {row['ended']:>5}", file=sys.stderr, flush=True)
    return rows


def _cells() -> Iterator[tuple[str, Cell]]:
    for scenario, rate, error in product(SCENARIOS, RATES, BASE_ERRORS):
        # All requests are the canary's: nothing is drawn.
        if scenario not in draws.PARTS:
            yield "healthy", Cell(rate, error, scenario, replicas=1)
    for (name, fault), rate in product(FAULTS.items(), RATES):
        yield name, Cell(rate, BASE_ERRORS[0], fault=fault, replicas=1)


@dataclass(frozen=True)
class _Ended:
    """Seconds from the bake's beginning, or the fault's, to each trigger's verdict (inf: none).

    `at` is (triggers, rollouts).
    """

    triggers: tuple[str, ...]
    at: Array


def _run(cell: Cell, rollouts: int, seed: int) -> _Ended:
    healthy = cell.fault == Fault()
    plan = bake_plan(cell.rate, onset=not healthy)
    begins = len(plan.lengths_s) - (1 if healthy else 2)
    onset = plan.starts_s(len(plan.lengths_s) - 1)
    cell = replace(cell, fault=replace(cell.fault, from_step=len(plan.lengths_s) - 1))
    rng = simulate.generator(cell, seed)
    watching = [t for t in plan.spec.analysis.triggers if t.kind in (*_EVENT, "slo_burn")]
    found = []
    for first in range(0, rollouts, _CHUNK):
        counts = traffic.draw(cell, plan, min(_CHUNK, rollouts - first), rng)
        found.append(
            np.stack(
                [
                    _burnt(trigger, counts, plan, begins, rng)
                    if trigger.kind == "slo_burn"
                    else first_failure(trigger, counts, plan, begins, rng)
                    for trigger in watching
                ]
            )
        )
    at = np.concatenate(found, axis=1)
    at = np.where(at > onset, at - onset, NEVER)
    return _Ended(tuple(t.name for t in watching), at)


def bake_plan(rate: float, *, onset: bool = False) -> Plan:
    """The default plan and its bake as steps: one, or two where a fault begins in its midst."""
    ramp = default_ramp(rate)
    halves = (ONSET_S, HOUR_S - ONSET_S) if onset else (HOUR_S,)
    steps = (*ramp.spec.steps, *(Step(100, seconds) for seconds in halves))
    return Plan.of(replace(ramp.spec, steps=steps), (*ramp.lengths_s, *halves), rate)


def _burnt(
    trigger: Trigger, counts: Counts, plan: Plan, begins: int, rng: np.random.Generator
) -> Array:
    """When the budget burns in the bake. What does before it is no matter of the bake."""
    before = plan.begin < plan.starts_s(begins)
    blocks = counts.blocks.copy()
    blocks[:, before, 0, :STABLE, 1::2] = 0.0
    return slo_burn.first_failure(trigger, replace(counts, blocks=blocks), plan, rng)


def first_failure(
    trigger: Trigger, counts: Counts, plan: Plan, begins: int, rng: np.random.Generator
) -> Array:
    """The second at which the bake's test fails first, by rollout; the steps' evidence left out."""
    event = EVENTS.index(_EVENT[trigger.kind])
    blocks = counts.blocks[:, :, event] if event else traffic.attempts(counts.blocks)
    start = plan.starts_s(begins)
    inside = np.nonzero(plan.begin >= start)[0]
    by_second = np.concatenate(
        [_seconds(blocks[:, b, 0], int(plan.seconds[b]), rng) for b in inside], axis=1
    )
    ramp = blocks[:, plan.begin < start, STABLE]
    stable = np.stack(
        [ramp[:, plan.step[: ramp.shape[1]] == s].sum(axis=1) for s in range(begins)], axis=1
    )
    if trigger.kind == "errors":
        stable = np.concatenate([counts.before[:, np.newaxis, 0, STABLE], stable], axis=1)
    analysis = plan.spec.analysis
    tolerated = tolerance(trigger, analysis.alpha)
    needed = log_threshold(trigger.weight * BAKE, analysis.alpha)
    at = np.full(len(by_second), NEVER)
    for i, seconds in enumerate(by_second):
        allowed = tolerated.of(stable[i])
        for second in np.nonzero(_ceiling(seconds, allowed) >= needed - _MARGIN)[0]:
            watch = _watch(stable[i], _parts(seconds, int(second) + 1), tolerated)
            n, _ = watch.canary
            enough = n >= analysis.min_units and watch.clusters >= analysis.min_events
            if enough and watch.log_e >= needed:
                at[i] = start + second + 1.0
                break
    return at


def _seconds(totals: Array, length: int, rng: np.random.Generator) -> Array:
    """A block's counts (rollouts, 4) second by second: (rollouts, seconds, 4)."""
    return np.diff(traffic.split(totals, length, rng), axis=1, prepend=0.0)


def _parts(seconds: Array, until: int) -> Array:
    """Counts (seconds, 4) by part of the bake: (parts, 4)."""
    starts = np.arange(0, until, _PART_S)
    found: Array = np.add.reduceat(seconds[:until], starts, axis=0)
    return found


def _ceiling(seconds: Array, tolerated: float) -> Array:
    """At each second, what the log e-value does not exceed: the best bet of every copy."""
    total = seconds[:, :2].cumsum(axis=0)
    copies = np.zeros((_PARTS, len(seconds)))
    for part, first in enumerate(range(0, HOUR_S, _PART_S)):
        since = total[first:] - (total[first - 1] if part else 0.0)
        n, k = np.maximum(since[:, 0], 1.0), since[:, 1]
        rate = np.clip(k / n, tolerated, 1 - 1e-12)
        gain = k * np.log(rate / tolerated) + (n - k) * np.log((1 - rate) / (1 - tolerated))
        copies[part, first:] = np.minimum(gain, _LARGEST)
    found: Array = np.log(np.exp(copies).mean(axis=0))
    return found


def _watch(stable: Array, bake: Array, tolerated: Tolerance) -> Watch:
    """The product's view of stable's counts (epochs, 4) and the canary's (parts, 4)."""
    last = len(stable)
    epochs = [Epoch(i, i, 0.5) for i in range(last)]
    epochs += [Epoch(last + part, last, 1.0, part=part) for part in range(len(bake))]
    counts = {i: EpochCounts(stable={"s": _row(row)}) for i, row in enumerate(stable)}
    counts |= {last + i: EpochCounts(canary={"c": _row(row)}) for i, row in enumerate(bake)}
    return Watch(epochs, counts, lambda row: row.failures, tolerated, last=last, planned=_PARTS)


def _row(counted: Array) -> ArmCountsRow:
    """Whatever the event is, as if it were a failure."""
    n, k, batches, failed = (int(value) for value in counted)
    return ArmCountsRow(requests=n, failed=k, batches=batches, failed_batches=failed)
