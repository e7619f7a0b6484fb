"""Counters of the data plane.

Nothing here knows Prometheus: a gateway reports its totals since start to the controller every
tick, and the controller exposes the sum over gateways when it is scraped. Totals, not differences,
so a lost report loses nothing.

A run costs three appends: its times are put into buckets later, thousands at once.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

import numpy as np

from serving.gateway.pending import Floats, Pending
from serving.gateway.usage import UsageMeter
from serving.tenant_settings import DEFAULT_TENANT

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

    def add_all(self, values: Floats) -> None:
        """Count many observations."""
        buckets = np.searchsorted(self._bounds, values, side="left")
        for bucket, n in enumerate(np.bincount(buckets, minlength=len(self.counts)).tolist()):
            self.counts[bucket] += n
        self.sum += float(values.sum())

    def to_dict(self) -> dict[str, Any]:
        """A copy as plain JSON types."""
        return {"counts": list(self.counts), "sum": self.sum}


class ArmRecorder:
    """Totals of one model version at one gateway. Durations are seconds."""

    __slots__ = (
        "_compute",
        "_histograms",
        "_latency",
        "_outcomes",
        "_queue",
        "batch_size",
        "usage",
    )

    def __init__(self, tenant: str | None = DEFAULT_TENANT) -> None:
        """`tenant` is the only one that there is; None if requests say whose they are."""
        self._outcomes: dict[str, int] = {}
        # Of answers that are not in the histograms yet.
        self._latency, self._queue, self._compute = Pending(), Pending(), Pending()
        self._histograms = {
            part: Histogram(SECONDS_BOUNDS) for part in ("latency", "gateway", "queue", "compute")
        }
        self.batch_size = Histogram(ROWS_BOUNDS)
        self.usage = UsageMeter(tenant)

    @property
    def outcomes(self) -> dict[str, int]:
        """Requests by outcome."""
        self._settle()
        return dict(self._outcomes)

    def answered(self, totals: list[float], queues: list[float], compute: float) -> None:
        """Count requests that the model answered in one run, each with its own time in a queue."""
        self._latency.extend(totals)
        self._queue.extend(queues)
        self._compute.repeat(compute, len(totals))
        if self._latency.full:
            self._settle()

    def refused(self, outcome: str, total: float) -> None:
        """Count a request that ended in an error; `outcome` is the error's slug, or "cancelled"."""
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1
        self._histograms["latency"].add(total)

    def to_dict(self) -> dict[str, Any]:
        """All totals, as plain JSON types."""
        return {
            "requests": self.outcomes,
            **{part: histogram.to_dict() for part, histogram in self._histograms.items()},
            "batch_size": self.batch_size.to_dict(),
        }

    def _settle(self) -> None:
        """Count the pending answers."""
        latency, queue, compute = (p.take() for p in (self._latency, self._queue, self._compute))
        if not len(latency):
            return
        self._outcomes["success"] = self._outcomes.get("success", 0) + len(latency)
        parts = {
            "latency": latency,
            "gateway": latency - queue - compute,
            "queue": queue,
            "compute": compute,
        }
        for part, values in parts.items():
            self._histograms[part].add_all(values)
