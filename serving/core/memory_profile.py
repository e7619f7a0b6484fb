"""How much GPU memory a model version takes, from what its first load measured or its size tells.

A replica gets a lease: its measured need, and on top of it a margin, that share of the lease which
what was measured leaves unused. It is capped at its lease, so as long as the leases on a GPU add up
to no more than its memory, nobody takes a neighbour's, and what was measured adds up to no more
than memory × (1 − margin). The margin is taken here and nowhere else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_GIB: Final = 1 << 30
_ESTIMATED_COPIES: Final = 2
"""Weights as they are on disk, and as much again for what the runtime makes of them."""
_ESTIMATED_REST: Final = _GIB
"""CUDA context, kernels, workspace and activations of a model nobody has run yet."""


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What one version took on one type of device with one runtime. All sizes are bytes.

    `weights_bytes` is there from the load on, `workspace_bytes` from the first run on (context,
    kernels, scratch memory). `buckets` maps row counts to the most that activations took in a run
    of so many rows, beyond the other two. Raises `ValueError` on sizes that cannot be.
    """

    device_type: str
    runtime: str
    weights_bytes: int
    workspace_bytes: int
    buckets: Mapping[int, int]

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("a memory profile needs at least one bucket")
        if min(self.buckets) < 1:
            raise ValueError(f"a bucket has at least one row, not {min(self.buckets)}")
        if min(self.weights_bytes, self.workspace_bytes, *self.buckets.values()) < 0:
            raise ValueError("a memory profile has no negative sizes")

    def need(self, max_size: int, margin: float = 0.0) -> int:
        """Bytes for runs of up to `max_size` rows, `margin` (0 ≤ margin < 1) of them spare."""
        measured = self.weights_bytes + self.workspace_bytes + self.peak(max_size)
        return with_margin(measured, margin)

    def peak(self, rows: int) -> int:
        """Most bytes of activations in any run of up to `rows` rows.

        Between two buckets it lies on the line between them. Past the last one it grows by the row
        as fast as between the last two, or as fast as from nothing to the last, whichever is more.
        """
        sizes = sorted(self.buckets)
        # A run of fewer rows that took more can happen too.
        peaks = list(itertools.accumulate((self.buckets[s] for s in sizes), max))
        if rows <= sizes[0]:
            return peaks[0]
        for (r0, p0), (r1, p1) in itertools.pairwise(zip(sizes, peaks, strict=True)):
            if rows <= r1:
                return p0 + math.ceil((p1 - p0) * (rows - r0) / (r1 - r0))
        slope = peaks[-1] / sizes[-1]
        if len(sizes) > 1:
            slope = max(slope, (peaks[-1] - peaks[-2]) / (sizes[-1] - sizes[-2]))
        return peaks[-1] + math.ceil(slope * (rows - sizes[-1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "device_type": self.device_type,
            "runtime": self.runtime,
            "weights_bytes": self.weights_bytes,
            "workspace_bytes": self.workspace_bytes,
            "buckets": {str(rows): peak for rows, peak in sorted(self.buckets.items())},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MemoryProfile:
        """Read `to_dict`'s form. Raises `ValueError`, `KeyError` or `TypeError` on another."""
        buckets = {int(rows): int(peak) for rows, peak in raw["buckets"].items()}
        return cls(**{**raw, "buckets": buckets})


def with_margin(measured: int, margin: float) -> int:
    """The lease, in bytes, of which `measured` leaves the share `margin` unused."""
    if not 0.0 <= margin < 1.0:
        raise ValueError(f"a margin is at least 0 and below 1, not {margin:g}")
    return math.ceil(measured / (1.0 - margin))


def estimated_need(artifact_bytes: int) -> int:
    """Bytes for a version that was never run, going by the size of its files. Has no margin."""
    return _ESTIMATED_COPIES * artifact_bytes + _ESTIMATED_REST


def format_need(count: int) -> str:
    """Bytes as people read them, rounded up: `14.2 GiB`, below one GiB `512 MiB`."""
    return _format(count, math.ceil)


def format_free(count: int) -> str:
    """Bytes rounded down, so that what does not fit never reads as if it did."""
    return _format(count, math.floor)


def _format(count: int, rounded: Callable[[float], int]) -> str:
    if count < _GIB:
        return f"{rounded(count / (1 << 20))} MiB"
    return f"{rounded(10 * count / _GIB) / 10:.1f} GiB"
