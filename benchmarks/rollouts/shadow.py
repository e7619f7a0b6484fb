"""When the comparisons of shadow traffic fail a canary."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.rollouts.cells import Array, Cell, Plan
from benchmarks.rollouts.traffic import DISAGREEING, NEVER, shadow_pairs
from serving.core import triggers
from serving.core.evidence import log_e_bounded, log_threshold
from serving.core.rollout_spec import Trigger


def first_failure(
    trigger: Trigger, cell: Cell, plan: Plan, rollouts: int, rng: np.random.Generator
) -> Array:
    """The second at which the trigger fails first, by rollout: before the first step, so ≤ 0."""
    lasts, pairs = shadow_pairs(cell, plan.spec)
    seconds = int(np.ceil(lasts))
    if not seconds:
        return np.full(rollouts, NEVER)
    analysis = plan.spec.analysis
    n = rng.poisson(pairs, (rollouts, seconds)).cumsum(axis=1)
    share = min(DISAGREEING * cell.fault.disagreement, 1.0)
    k = rng.binomial(np.diff(n, axis=1, prepend=0), share).cumsum(axis=1)
    needed = disagreements_needed(trigger, analysis.alpha, int(n.max()))
    failing = (k >= np.maximum(needed, analysis.min_events)[n]) & (n >= analysis.min_units)
    return np.where(failing.any(axis=1), failing.argmax(axis=1) + 1.0 - seconds, NEVER)


def disagreements_needed(trigger: Trigger, alpha: float, most: int) -> NDArray[np.int64]:
    """For each number of pairs up to `most`, the fewest disagreements that fail the trigger."""
    # Rounded up, so that few tables are made.
    size = 1000 * (most // 1000 + 1)
    return np.array(_needed(trigger.q0, log_threshold(trigger.weight, alpha), size))


@cache
def _needed(q0: float, threshold: float, most: int) -> tuple[int, ...]:
    found, k = [], 0
    for n in range(most + 1):
        while k <= n and log_e_bounded(k, n, q0, *triggers.DISAGREEING) < threshold:
            k += 1
        found.append(k)
    return tuple(found)
