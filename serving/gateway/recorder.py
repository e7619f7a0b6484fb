"""Counters of the data plane, as plain lists that the hot path increments.

Nothing here knows Prometheus: a gateway reports its totals since start to the controller every
tick, and the controller exposes the sum over gateways when it is scraped. Totals, not differences,
so a lost report loses nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

SECONDS_BOUNDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0,
)  # fmt: skip
ROWS_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Histogram:
    """Counts per bucket (upper bounds inclusive, a last one for what is above) and a sum."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def to_dict(self) -> dict[str, Any]:
        """A copy as plain JSON types."""
        return {"counts": list(self.counts), "sum": self.sum}


class ArmRecorder:
    """Totals of one model version at one gateway. Durations are seconds."""

    __slots__ = ("batch_size", "compute", "gateway", "latency", "outcomes", "queue")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.latency = Histogram(SECONDS_BOUNDS)
        self.gateway = Histogram(SECONDS_BOUNDS)
        self.queue = Histogram(SECONDS_BOUNDS)
        self.compute = Histogram(SECONDS_BOUNDS)
        self.batch_size = Histogram(ROWS_BOUNDS)

    def answered(self, total: float, queue: float, compute: float) -> None:
        """Count a request that the model answered."""
        outcomes = self.outcomes
        outcomes["success"] = outcomes.get("success", 0) + 1
        self.latency.add(total)
        self.queue.add(queue)
        self.compute.add(compute)
        self.gateway.add(total - queue - compute)

    def refused(self, outcome: str, total: float) -> None:
        """Count a request that ended in an error; `outcome` is the error's slug, or "cancelled"."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.latency.add(total)

    def to_dict(self) -> dict[str, Any]:
        """All totals, as plain JSON types."""
        return {
            "requests": dict(self.outcomes),
            "latency": self.latency.to_dict(),
            "gateway": self.gateway.to_dict(),
            "queue": self.queue.to_dict(),
            "compute": self.compute.to_dict(),
            "batch_size": self.batch_size.to_dict(),
        }
