"""Warm-up of a replica, and what it shows of the GPU memory that a model takes."""

from __future__ import annotations

from collections.abc import Sequence

from serving.core.memory_profile import MemoryProfile
from serving.replica.backends.base import Array
from serving.replica.backends.meters import Meter
from serving.replica.engine import Engine
from serving.replica.golden import run_at, warm_sizes, warm_up


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
    return MemoryProfile(
        meter.device_type,
        engine.backend.platform,
        weights_bytes=max(0, loaded - meter.context_bytes),
        workspace_bytes=meter.context_bytes + max(0, settled - loaded),
        buckets=_peaks(engine, sample, sizes, meter, settled),
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
