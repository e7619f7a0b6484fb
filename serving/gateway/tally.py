"""What an arm's replica has come to in an epoch: totals that go to the controller.

A run is a few appends; what it was is put into buckets and named later, many runs at a time.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any, Final

import numpy as np

from serving.core.predictions import Codes, PredictionReader, name_of
from serving.core.rollout_counts import LATENCY_BOUNDS
from serving.gateway.pending import Pending

_MAX_PENDING: Final = 8192
_MAX_PENDING_BYTES: Final = 1 << 20
_BOUNDS: Final = np.array(LATENCY_BOUNDS)


class Latencies:
    """A fine histogram of seconds; observations are put into buckets many at a time."""

    __slots__ = ("_counts", "_pending")

    def __init__(self) -> None:
        self._counts = np.zeros(len(LATENCY_BOUNDS) + 1, np.int64)
        self._pending = Pending()

    def extend(self, seconds: list[float]) -> None:
        """Add observations."""
        self._pending.extend(seconds)
        if self._pending.full:
            self._settle()

    def to_dict(self) -> dict[str, int]:
        """Counts by bucket index, where there are any."""
        self._settle()
        (at,) = self._counts.nonzero()
        return {str(i): int(self._counts[i]) for i in at}

    def _settle(self) -> None:
        buckets = np.searchsorted(_BOUNDS, self._pending.take(), side="left")
        self._counts += np.bincount(buckets, minlength=len(self._counts))


class Predictions:
    """How often each was made; they are read, named and counted many at a time."""

    __slots__ = (
        "_bytes",
        "_codes",
        "_counts",
        "_outputs",
        "_reader",
        "_row_bytes",
        "_rows",
        "_tail",
        "_unread",
    )

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._codes: list[Codes] = []
        # Outputs that are not read yet, one after another, all of rows of one shape.
        self._outputs: list[bytes] = []
        self._reader: PredictionReader | None = None
        self._tail: tuple[int, ...] = ()
        self._row_bytes = 0
        # How many rows are not counted yet, and of them not read; bytes of the latter.
        self._rows = self._unread = self._bytes = 0

    def extend(self, codes: Codes) -> None:
        """Add predictions."""
        self._codes.append(codes)
        self._rows += len(codes)
        if self._rows >= _MAX_PENDING:
            self._settle()

    def read_later(
        self, reader: PredictionReader, shape: tuple[int, ...], data: memoryview
    ) -> None:
        """Add those of a run's output, a prediction a row, which `reader` is to read.

        Raises ValueError where `data` does not have the elements of `shape`.
        """
        rows, tail = shape[0], shape[1:]
        if tail != self._tail or reader is not self._reader:
            self._read()
            self._reader, self._tail = reader, tail
            self._row_bytes = prod(tail) * reader.itemsize
        if len(data) != rows * self._row_bytes:
            raise ValueError(f"{len(data)} bytes are no output of shape {list(shape)}")
        self._outputs.append(bytes(data))
        self._unread += rows
        self._bytes += len(data)
        self._rows += rows
        if self._rows >= _MAX_PENDING or self._bytes >= _MAX_PENDING_BYTES:
            self._settle()

    def to_dict(self) -> dict[str, int]:
        """Counts by name."""
        self._settle()
        return dict(self._counts)

    def _read(self) -> None:
        if self._reader is not None and self._outputs:
            shape = (self._unread, *self._tail)
            self._codes.append(self._reader.read(shape, b"".join(self._outputs)))
        self._outputs, self._unread, self._bytes = [], 0, 0

    def _settle(self) -> None:
        self._read()
        if self._codes:
            values, counts = np.unique(np.concatenate(self._codes), return_counts=True)
            for value, n in zip(values.tolist(), counts.tolist(), strict=True):
                self._counts[name_of(value)] += n
        self._codes, self._rows = [], 0


class Tally:
    """The counts of one replica in a trial."""

    __slots__ = (
        "batch_latency",
        "batches",
        "busy_ns",
        "failed",
        "failed_batches",
        "given_up",
        "given_up_batches",
        "labels",
        "latency",
        "predictions",
        "requests",
        "wrong",
    )

    def __init__(self) -> None:
        self.requests = self.failed = self.batches = self.failed_batches = 0
        self.latency, self.batch_latency = Latencies(), Latencies()
        self.predictions = Predictions()
        self.labels = self.wrong = 0
        self.given_up = self.given_up_batches = 0
        self.busy_ns = 0

    def to_dict(self) -> dict[str, Any]:
        """Totals in plain JSON types."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "batches": self.batches,
            "failed_batches": self.failed_batches,
            "latency": self.latency.to_dict(),
            "batch_latency": self.batch_latency.to_dict(),
            "predictions": self.predictions.to_dict(),
            "labels": {"n": self.labels, "k": self.wrong},
            "busy_ns": self.busy_ns,
            "given_up": self.given_up,
            "given_up_batches": self.given_up_batches,
        }
