"""The GPUs as one JSON document, for the command line and the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from serving.control.fleet import Replica
from serving.control.gpus import Gpus, Standing
from serving.core.gpus import GpuProcess
from serving.store.cordons import CordonRow


def gpus_view(
    gpus: Gpus, price: Callable[[str], float | None], stays: Mapping[str, str]
) -> dict[str, Any]:
    """Every GPU, every node that has some, and the cordons of GPUs that are on none.

    `price` gives the USD an hour of a GPU by its UUID, None where it is not known. `stays` says why
    replicas of an application do not leave a cordoned GPU.
    """
    return {
        "gpus": [_gpu(standing, price(standing.gpu.uuid), stays) for standing in gpus.standings()],
        "nodes": [asdict(node) for node in gpus.nodes()],
        "absent": [asdict(row) for row in gpus.absent_cordons()],
    }


def _gpu(
    standing: Standing, usd_per_hour: float | None, stays: Mapping[str, str]
) -> dict[str, Any]:
    """One GPU. What is not known is null. Memory in bytes."""
    gpu, sample = standing.gpu, standing.sample
    plain = sample.to_dict() if sample is not None else {}
    processes = plain.pop("processes", None)
    for name in ("memory_used", "memory_reserved", "lost"):
        plain.pop(name, None)
    return {
        **gpu.to_dict(),
        "host": standing.host,
        "health": standing.condition.health.value,
        "reasons": list(standing.condition.reasons),
        "cordon": _cordon(standing.cordon),
        "age_s": round(standing.age_s, 3),
        "memory": _memory(standing),
        "usd_per_hour": usd_per_hour,
        "sample": plain or None,
        "replicas": [
            {
                **_replica(r, sample.processes if sample else None),
                "stays": stays.get(r.app) if standing.cordon else None,
            }
            for r in standing.replicas
        ],
        "other_processes": _others(standing.replicas, processes),
        "xids": [{**e.to_dict(), "class": e.kind.value} for e in standing.xids],
    }


def _cordon(row: CordonRow | None) -> dict[str, Any] | None:
    return None if row is None else asdict(row)


def _memory(standing: Standing) -> dict[str, Any]:
    """`leased` is what replicas were given; `used` and `reserved` (by the driver) are measured."""
    sample, total = standing.sample, standing.gpu.memory_bytes
    used = sample.memory_used if sample is not None else None
    reserved = sample.memory_reserved if sample is not None else None
    free = None if total is None or used is None else total - used - (reserved or 0)
    leased = sum(int(r.info.get("lease_bytes") or 0) for r in standing.replicas)
    return {"total": total, "leased": leased, "used": used, "reserved": reserved, "free": free}


def _replica(replica: Replica, processes: Sequence[GpuProcess] | None) -> dict[str, Any]:
    info = replica.info
    used = {p.pid: p.memory_bytes for p in processes or ()}.get(int(info["pid"]))
    keys = ("replica", "app", "model", "version", "pid", "state", "lease_bytes")
    return {**{key: info.get(key) for key in keys}, "memory_bytes": used}


def _others(
    replicas: Sequence[Replica], processes: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]] | None:
    ours = {int(r.info["pid"]) for r in replicas}
    return None if processes is None else [p for p in processes if p["pid"] not in ours]
