"""Metrics of GPUs under the names that Triton gives them."""

from __future__ import annotations

from typing import Final

from serving.metrics.family import Metric

_NV: Final = ("gpu_uuid",)
NV_UTILIZATION: Final = Metric(
    "nv_gpu_utilization", "gauge", "serving_gpu_utilization under Triton's name.", _NV
)
NV_POWER: Final = Metric(
    "nv_gpu_power_usage", "gauge", "serving_gpu_power_watts under Triton's name.", _NV
)
NV_POWER_LIMIT: Final = Metric(
    "nv_gpu_power_limit", "gauge", "serving_gpu_power_limit_watts under Triton's name.", _NV
)
NV_MEMORY_USED: Final = Metric(
    "nv_gpu_memory_used_bytes",
    "gauge",
    "serving_gpu_memory_used_bytes under Triton's name.",
    _NV,
)
NV_MEMORY_TOTAL: Final = Metric(
    "nv_gpu_memory_total_bytes",
    "gauge",
    "serving_gpu_memory_total_bytes under Triton's name.",
    _NV,
)
# A counter by what it counts, but its name lacks the ending that counters must have here.
NV_ENERGY: Final = Metric(
    "nv_energy_consumption",
    "gauge",
    "serving_gpu_energy_joules_total under Triton's name, which has no _total.",
    _NV,
)

METRICS: Final = (
    NV_UTILIZATION,
    NV_POWER,
    NV_POWER_LIMIT,
    NV_MEMORY_USED,
    NV_MEMORY_TOTAL,
    NV_ENERGY,
)
