"""The GPUs as Prometheus metrics: under our names, and those of Triton that dashboards know.

What is not measured, or was too long ago, has no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client.metrics_core import Metric as Family

from serving.control.gpus import Gpus, Standing
from serving.control.metric_families import family_of
from serving.core.gpus import GpuSample
from serving.metrics import gpus as metrics
from serving.metrics import triton
from serving.metrics.family import Metric

_MEASURED: Final[dict[Metric, Callable[[GpuSample], float | None]]] = {
    metrics.GPU_MEMORY_USED: lambda s: s.memory_used,
    metrics.GPU_MEMORY_RESERVED: lambda s: s.memory_reserved,
    metrics.GPU_UTILIZATION: lambda s: s.utilization,
    metrics.GPU_POWER: lambda s: s.power_w,
    metrics.GPU_POWER_LIMIT: lambda s: s.power_limit_w,
    metrics.GPU_ENERGY: lambda s: s.energy_j,
    metrics.GPU_TEMPERATURE: lambda s: s.temperature_c,
    metrics.GPU_ECC: lambda s: s.ecc_uncorrected,
    metrics.GPU_REMAPPED: lambda s: s.remapped_rows,
}
_TRITON: Final[dict[Metric, Callable[[GpuSample], float | None]]] = {
    triton.NV_UTILIZATION: lambda s: s.utilization,
    triton.NV_POWER: lambda s: s.power_w,
    triton.NV_POWER_LIMIT: lambda s: s.power_limit_w,
    triton.NV_MEMORY_USED: lambda s: s.memory_used,
    triton.NV_ENERGY: lambda s: s.energy_j,
}
_OTHERS: Final = (
    metrics.GPU_INFO,
    metrics.GPU_MEMORY_TOTAL,
    metrics.GPU_MEMORY_LEASED,
    metrics.GPU_THROTTLED,
    metrics.GPU_HEALTH,
    metrics.GPU_CORDONED,
    metrics.GPU_REPLICAS,
    metrics.GPU_XIDS,
    triton.NV_MEMORY_TOTAL,
)


def gpu_families(gpus: Gpus) -> Iterator[Family]:
    """Every family of GPUs."""
    families = {m.name: family_of(m) for m in (*_MEASURED, *_TRITON, *_OTHERS)}
    for standing in gpus.standings():
        _add_facts(families, standing)
        if standing.sample is not None:
            _add_sample(families, standing, standing.sample)
    for (uuid, xid), n in sorted(gpus.xid_counts().items()):
        families[metrics.GPU_XIDS.name].add_metric([uuid, str(xid)], n)
    yield from families.values()


def _add_facts(families: dict[str, Any], standing: Standing) -> None:
    gpu, replicas = standing.gpu, standing.replicas
    key = [gpu.uuid, standing.host]

    def add(metric: Metric, labels: list[str], value: Any) -> None:
        families[metric.name].add_metric(labels, value)

    add(
        metrics.GPU_INFO,
        key,
        {"name": gpu.name, "index": str(gpu.index), "mig_parent": gpu.mig_parent or ""},
    )
    if gpu.memory_bytes is not None:
        add(metrics.GPU_MEMORY_TOTAL, key, gpu.memory_bytes)
        add(triton.NV_MEMORY_TOTAL, key[:1], gpu.memory_bytes)
    leased = sum(int(r.info.get("lease_bytes") or 0) for r in replicas)
    add(metrics.GPU_MEMORY_LEASED, key, leased)
    add(metrics.GPU_HEALTH, [*key, standing.condition.health.value], 1.0)
    add(metrics.GPU_CORDONED, key, float(standing.cordon is not None))
    add(metrics.GPU_REPLICAS, key, len(replicas))


def _add_sample(families: dict[str, Any], standing: Standing, sample: GpuSample) -> None:
    uuid, host = standing.gpu.uuid, standing.host
    for metric, read in _MEASURED.items():
        if (value := read(sample)) is not None:
            families[metric.name].add_metric([uuid, host], value)
    for metric, read in _TRITON.items():
        if (value := read(sample)) is not None:
            families[metric.name].add_metric([uuid], value)
    for reason in sample.throttle or ():
        families[metrics.GPU_THROTTLED.name].add_metric([uuid, host, reason], 1.0)
