"""Energy of GPUs that do not count it, from their power: watts times seconds, measured each second.

An estimate: power between two measurements is taken to lie between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from serving.core.gpus import Gpu, GpuSample

_LONGEST_S: Final = 10.0
"""What a GPU drew over a longer time without a measurement is not known, and left out."""


class PowerIntegral:
    """Joules by GPU since the agent started. One thread uses it."""

    def __init__(self) -> None:
        # By UUID: when its power was measured last (monotonic), how much it was, joules so far.
        self._known: dict[str, tuple[float, float, float]] = {}

    def added(self, gpu: Gpu, sample: GpuSample, now: float) -> GpuSample:
        """The sample with the energy by its power, where the GPU has no counter. `now` in s."""
        if sample.energy_j is not None or sample.power_w is None:
            return sample
        at, watts, joules = self._known.get(gpu.uuid, (now, sample.power_w, 0.0))
        if now - at <= _LONGEST_S:
            joules += (now - at) * (watts + sample.power_w) / 2
        self._known[gpu.uuid] = now, sample.power_w, joules
        return replace(sample, power_energy_j=joules)
