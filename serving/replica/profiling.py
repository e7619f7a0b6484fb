"""Warm-up of a replica, and what it shows of the GPU memory that a model takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from serving.core.memory_profile import MemoryProfile, format_need
from serving.replica.backends.base import Array
from serving.replica.backends.meters import Meter
from serving.replica.engine import Engine
from serving.replica.golden import run_at, warm_sizes, warm_up

_log = logging.getLogger(__name__)


def profiled_warm_up(engine: Engine, sample: Sequence[Array]) -> MemoryProfile | None:
    """Run the sample at every size that the replica will run; None on the CPU.

    A size that does not fit into memory has no entry in the profile, nor has any larger one. Raises
    `ArtifactError` if the model fails, `DeviceError` where the GPU's memory cannot be read.
    """
    meter = engine.backend.meter
    if meter is None:
        warm_up(engine, sample)
        return None
    loaded = meter.held_bytes()
    sizes = warm_sizes(engine)
    # The first run loads kernels and library handles, which stay.
    run_at(engine, sample, sizes[0])
    meter.restart()
    settled = meter.held_bytes()
    peaks = _peaks(engine, sample, sizes, meter, settled)
    _warn_beyond_limit(meter)
    return MemoryProfile(
        meter.device_type,
        engine.backend.platform,
        weights_bytes=max(0, loaded - meter.context_bytes),
        workspace_bytes=meter.context_bytes + max(0, settled - loaded),
        buckets=peaks,
    )


def _warn_beyond_limit(meter: Meter) -> None:
    """Allocators keep to their limit; kernels and library handles come on top of it."""
    if meter.limit_bytes is not None and (held := meter.held_bytes()) > meter.limit_bytes:
        _log.warning(
            "after its warm-up this replica holds %s of %s, and may hold %s: give the model more "
            "(gpu_memory_bytes), or raise gpu.safety_margin",
            format_need(held),
            meter.device_type,
            format_need(meter.limit_bytes),
        )


def _peaks(
    engine: Engine, sample: Sequence[Array], sizes: Sequence[int], meter: Meter, settled: int
) -> dict[int, int]:
    """The most bytes beyond `settled` in a run of each size, up to the first that does not fit."""
    peaks: dict[int, int] = {}
    for rows in sizes:
        meter.restart()
        run_at(engine, sample, rows)
        fits = rows if engine.ceiling is None else min(rows, engine.ceiling)
        if fits == rows or not peaks:
            peaks[fits] = max(0, meter.peak_bytes() - settled)
        if fits < rows:
            break
    return peaks
