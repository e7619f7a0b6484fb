"""What is frozen from the stable version when a step begins: latency bounds and prediction bins.

A bound may come from any data that was seen before the epoch which uses it: then "slower than the
bound" is an event fixed in advance, and its evidence is valid however traffic goes on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Final

from serving.core.rollout_counts import LATENCY_BOUNDS, ArmCountsRow, EpochCounts, Histogram

TAIL: Final = (0.99, 1.1)
"""The tail's bound: this factor above this quantile of stable's latency."""
BODY: Final = (0.5, 1.25)
"""The body's bound. A version half as slow again may never pass the tail's."""
LEAST_S: Final = 0.0005
"""A bound is at least this far above its quantile: less is noise of the machine. A process that
gets two requests a second answers later than one that is always awake."""
MIN_ANSWERS: Final = 100
"""Fewer answers of stable say too little about its 99th percentile."""
LATEST_ANSWERS: Final = 1000
"""With so many answers in the latest epochs, older ones are not asked."""
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


def latency_bounds(stable: ArmCountsRow) -> tuple[int, ...] | None:
    """(tail, body) as indices into `LATENCY_BOUNDS`; None with too few answers to say.

    None, too, where stable is so slow that a bound would lie past the last one.
    """
    if stable.latency.total < MIN_ANSWERS:
        return None
    bounds = tuple(_bound(stable.latency, *rule) for rule in (TAIL, BODY))
    return bounds if max(bounds) < len(LATENCY_BOUNDS) else None


def drift_bins(stable: ArmCountsRow) -> tuple[str, ...] | None:
    """The most frequent predictions of stable, at most `NAMED_BINS`; None with too few to say."""
    if sum(stable.predictions.values()) < MIN_ANSWERS:
        return None
    # By name where frequencies are equal: the same counts always give the same bins.
    ordered = sorted(stable.predictions.items(), key=lambda item: (-item[1], item[0]))
    return tuple(name for name, _ in ordered[:NAMED_BINS])


def _bound(latency: Histogram, quantile: float, factor: float) -> int:
    seconds = latency.quantile(quantile)
    return bisect_left(LATENCY_BOUNDS, max(factor * seconds, seconds + LEAST_S))
