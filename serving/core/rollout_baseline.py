"""What is frozen from the stable version when a step begins: latency bounds and prediction bins.

A bound may come from any data that was seen before the epoch which uses it: then "slower than the
bound" is an event fixed in advance, and its evidence is valid however traffic goes on. So bounds
only change with a new epoch. One begins with each step, and in its midst where stable itself has
become faster or slower: bounds that lie far from what stable does now tell two versions apart
badly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Final

from serving.core.rollout_counts import LATENCY_BOUNDS, ArmCountsRow, EpochCounts, Histogram
from serving.core.rollout_spec import FLOOR_S

TAIL: Final = (0.99, 1.1)
"""The tail's bound: this factor above this quantile of stable's latency."""
BODY: Final = (0.5, 1.25)
"""The body's bound. A version half as slow again may never pass the tail's."""
ALONE: Final = (0.99, 2.0)
"""The bake's bound, where nothing tells a slow version from a busy hour: twice as slow is meant."""
MIN_ANSWERS: Final = 400
"""Fewer answers of stable set no bounds: the 99th percentile stands on four slower ones."""
LATEST_ANSWERS: Final = 1000
"""With so many answers in the latest epochs, older ones are not asked."""
_MOVED: Final = 3
"""So many buckets (22 %) are a change of stable's median, and not chance."""
_MIN_PREDICTIONS: Final = 100
NAMED_BINS: Final = 9
"""Predictions that are a bin of their own. All others together are one more."""


def stable_so_far(counts: Mapping[int, EpochCounts]) -> ArmCountsRow:
    """Stable's counts over the latest epochs that have `LATEST_ANSWERS`, or over all."""
    total = ArmCountsRow()
    for epoch in sorted(counts, reverse=True):
        if total.latency.total >= LATEST_ANSWERS:
            break
        total += counts[epoch].arm("stable")
    return total


def latency_bounds(stable: ArmCountsRow, floor_s: float = FLOOR_S) -> tuple[int, ...] | None:
    """(tail, body, bake's) as indices into `LATENCY_BOUNDS`; None with too few answers to say.

    Each is at least `floor_s` above its quantile. None, too, where stable is so slow that a bound
    would lie past the last one.
    """
    if stable.latency.total < MIN_ANSWERS:
        return None
    bounds = tuple(_bound(stable.latency, *rule, floor_s) for rule in (TAIL, BODY, ALONE))
    return bounds if max(bounds) < len(LATENCY_BOUNDS) else None


def moved_bounds(
    frozen: tuple[int, ...], stable: ArmCountsRow, changes: int, floor_s: float = FLOOR_S
) -> tuple[int, ...] | None:
    """New bounds where `stable`, counted since the old ones were frozen, has another median.

    None where it has not. After `changes` in one step twice as many answers are needed for each:
    a version whose latency goes up and down makes few epochs.
    """
    if stable.latency.total < LATEST_ANSWERS << changes:
        return None
    bounds = latency_bounds(stable, floor_s)
    return bounds if bounds and abs(bounds[1] - frozen[1]) >= _MOVED else None


def drift_bins(stable: ArmCountsRow) -> tuple[str, ...] | None:
    """The most frequent predictions of stable, at most `NAMED_BINS`; None with too few to say."""
    if sum(stable.predictions.values()) < _MIN_PREDICTIONS:
        return None
    # By name where frequencies are equal: the same counts always give the same bins.
    ordered = sorted(stable.predictions.items(), key=lambda item: (-item[1], item[0]))
    return tuple(name for name, _ in ordered[:NAMED_BINS])


def _bound(latency: Histogram, quantile: float, factor: float, floor_s: float) -> int:
    seconds = latency.quantile(quantile)
    return bisect_left(LATENCY_BOUNDS, max(factor * seconds, seconds + floor_s))
