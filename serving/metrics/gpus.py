"""Metrics of GPUs."""

from __future__ import annotations

from typing import Final

from serving.metrics.family import Metric

_GPU: Final = ("gpu", "host")
GPU_INFO: Final = Metric(
    "serving_gpu_info",
    "info",
    "A GPU, or a MIG slice of the one in `mig_parent`. `gpu` is the UUID, `index` that of NVML.",
    (*_GPU, "name", "index", "mig_parent"),
)
GPU_MEMORY_TOTAL: Final = Metric("serving_gpu_memory_total_bytes", "gauge", "Memory.", _GPU)
GPU_MEMORY_USED: Final = Metric(
    "serving_gpu_memory_used_bytes",
    "gauge",
    "Memory that processes use; with what the driver reserves where it tells only the sum.",
    _GPU,
)
GPU_MEMORY_RESERVED: Final = Metric(
    "serving_gpu_memory_reserved_bytes", "gauge", "Memory that driver and firmware keep.", _GPU
)
GPU_MEMORY_LEASED: Final = Metric(
    "serving_gpu_memory_leased_bytes", "gauge", "Memory that replicas were given.", _GPU
)
GPU_UTILIZATION: Final = Metric(
    "serving_gpu_utilization",
    "gauge",
    "The share of the last measurement period in which a kernel ran, 0 to 1. None under MIG.",
    _GPU,
)
GPU_POWER: Final = Metric("serving_gpu_power_watts", "gauge", "Power draw.", _GPU)
GPU_POWER_LIMIT: Final = Metric(
    "serving_gpu_power_limit_watts", "gauge", "Power draw that is allowed.", _GPU
)
GPU_ENERGY: Final = Metric(
    "serving_gpu_energy_joules", "counter", "Energy used since the driver was loaded.", _GPU
)
GPU_TEMPERATURE: Final = Metric(
    "serving_gpu_temperature_celsius", "gauge", "Temperature of the chip.", _GPU
)
GPU_THROTTLED: Final = Metric(
    "serving_gpu_throttled",
    "gauge",
    "1 for each reason that holds the clocks back.",
    (*_GPU, "reason"),
)
GPU_ECC: Final = Metric(
    "serving_gpu_ecc_uncorrected_errors",
    "counter",
    "Memory errors that ECC could not correct, since the driver was loaded.",
    _GPU,
)
GPU_REMAPPED: Final = Metric(
    "serving_gpu_remapped_rows", "gauge", "Memory rows that were replaced by spare ones.", _GPU
)
GPU_HEALTH: Final = Metric(
    "serving_gpu_health",
    "gauge",
    "1 for the health of each GPU: ok, throttled, unknown, degraded or failed.",
    (*_GPU, "health"),
)
GPU_CORDONED: Final = Metric(
    "serving_gpu_cordoned", "gauge", "1 if nothing new may start on the GPU, else 0.", _GPU
)
GPU_REPLICAS: Final = Metric("serving_gpu_replicas", "gauge", "Replicas that run on the GPU.", _GPU)
GPU_XIDS: Final = Metric(
    "serving_gpu_xid_errors",
    "counter",
    "Errors that the driver reported, by number, since the controller started.",
    ("gpu", "xid"),
)

METRICS: Final = (
    GPU_INFO,
    GPU_MEMORY_TOTAL,
    GPU_MEMORY_USED,
    GPU_MEMORY_RESERVED,
    GPU_MEMORY_LEASED,
    GPU_UTILIZATION,
    GPU_POWER,
    GPU_POWER_LIMIT,
    GPU_ENERGY,
    GPU_TEMPERATURE,
    GPU_THROTTLED,
    GPU_ECC,
    GPU_REMAPPED,
    GPU_HEALTH,
    GPU_CORDONED,
    GPU_REPLICAS,
    GPU_XIDS,
)
