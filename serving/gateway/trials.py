"""What a rollout learns at this gateway: counts an arm, an epoch and a replica.

Totals since the gateway's start, as all that it reports, so a lost report loses nothing. An epoch
has one weight; a request belongs to the epoch in which it was assigned, however late its answer.

A trial counts each way the evidence needs: requests and failed requests, batches and failed
batches. What a client did wrong, or gave up, is in neither.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from serving.core.rollout_counts import LATENCY_BOUNDS
from serving.errors import InvalidRequest, Overloaded, ServingError

if TYPE_CHECKING:
    from serving.gateway.infer import Call
    from serving.gateway.splitter import Splitter

STABLE: Final = "stable"
CANARY: Final = "canary"
_MAX_PENDING: Final = 8192
# A unit's failures beyond so many units are not counted at all: neither arm's, so neither gains.
_MAX_UNITS: Final = 1 << 16
_BOUNDS: Final = np.array(LATENCY_BOUNDS)


class Latencies:
    """A fine histogram of seconds; observations are put into buckets many at a time."""

    __slots__ = ("_counts", "_pending")

    def __init__(self) -> None:
        self._counts = np.zeros(len(LATENCY_BOUNDS) + 1, np.int64)
        self._pending = array("d")

    def extend(self, seconds: list[float]) -> None:
        """Add observations."""
        self._pending.extend(seconds)
        if len(self._pending) >= _MAX_PENDING:
            self._settle()

    def to_dict(self) -> dict[str, int]:
        """Counts by bucket index, where there are any."""
        self._settle()
        (at,) = self._counts.nonzero()
        return {str(i): int(self._counts[i]) for i in at}

    def _settle(self) -> None:
        if self._pending:
            buckets = np.searchsorted(_BOUNDS, np.array(self._pending), side="left")
            self._counts += np.bincount(buckets, minlength=len(self._counts))
            self._pending = array("d")


class Tally:
    """The counts of one replica in a trial."""

    __slots__ = (
        "batch_latency",
        "batches",
        "failed",
        "failed_batches",
        "labels",
        "latency",
        "predictions",
        "requests",
        "wrong",
    )

    def __init__(self) -> None:
        self.requests = self.failed = self.batches = self.failed_batches = 0
        self.latency, self.batch_latency = Latencies(), Latencies()
        self.predictions: Counter[str] = Counter()
        self.labels = self.wrong = 0

    def to_dict(self) -> dict[str, Any]:
        """Totals in plain JSON types."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "batches": self.batches,
            "failed_batches": self.failed_batches,
            "latency": self.latency.to_dict(),
            "batch_latency": self.batch_latency.to_dict(),
            "predictions": dict(self.predictions),
            "labels": {"n": self.labels, "k": self.wrong},
        }


class Cluster:
    """Requests whose first run failed together: whatever comes of each, one failed batch."""

    __slots__ = ("counted",)

    def __init__(self) -> None:
        self.counted = False


class Trial:
    """One arm in one epoch. `pending` collects the latencies of the batch at hand."""

    __slots__ = ("arm", "epoch", "failed_units", "pending", "rollout", "splitter", "tallies")

    def __init__(self, splitter: Splitter, rollout: str, epoch: int, arm: str) -> None:
        self.splitter = splitter
        self.rollout = rollout
        self.epoch = epoch
        self.arm = arm
        self.pending: list[float] = []
        self.tallies: dict[str, Tally] = {}
        self.failed_units: set[int] = set()

    def tally(self, replica: str) -> Tally:
        """The counts of one replica."""
        tally = self.tallies.get(replica)
        if tally is None:
            tally = self.tallies[replica] = Tally()
        return tally

    def batch_answered(self, replica: str) -> None:
        """Count the pending answers, which came of one run."""
        latencies, self.pending = self.pending, []
        tally = self.tally(replica)
        tally.requests += len(latencies)
        tally.batches += 1
        tally.latency.extend(latencies)
        tally.batch_latency.extend([max(latencies)])
        if self.arm == CANARY:
            self.splitter.breaker.succeeded()

    def failed(self, call: Call, error: ServingError) -> bool:
        """A request of this arm failed: count it, and say whether stable answers it instead.

        An input that the canary's model refuses is the client's fault if stable refuses it too, so
        that is counted once stable has answered.
        """
        if isinstance(error, Overloaded):
            return self.arm == CANARY and self.splitter.take_over(call, None)
        invalid = isinstance(error, InvalidRequest)
        if not invalid:
            self.count_failure(call)
        if self.arm == STABLE:
            return False
        return self.splitter.take_over(call, self if invalid else None)

    def count_failure(self, call: Call) -> None:
        """Count a failed request; of a batch, and of a unit that sticks to its arm, the first."""
        if not self._first_of_unit(call):
            return
        tally = self.tally(call.replica)
        tally.requests += 1
        tally.failed += 1
        cluster = call.cluster
        if cluster is None or not cluster.counted:
            tally.batches += 1
            tally.failed_batches += 1
            if cluster is not None:
                cluster.counted = True
            if self.arm == CANARY:
                self.splitter.breaker.failed()

    def _first_of_unit(self, call: Call) -> bool:
        unit = self.splitter.unit_hash(call)
        if unit is None:
            return True
        if unit in self.failed_units or len(self.failed_units) >= _MAX_UNITS:
            self.tally(call.replica).requests += 1
            return False
        self.failed_units.add(unit)
        return True

    def report(self) -> Iterator[dict[str, Any]]:
        """A row a replica."""
        for replica, tally in self.tallies.items():
            yield {
                "rollout": self.rollout,
                "epoch": self.epoch,
                "arm": self.arm,
                "replica": replica,
                **tally.to_dict(),
            }
