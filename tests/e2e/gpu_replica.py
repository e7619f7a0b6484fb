"""A replica that holds its lease on a GPU of the fake NVML, and runs its model on the CPU.

All but the model is real: the lease, the announcements, the place that Ray starts it at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from serving.core.replica import GpuLease, ReplicaSpec
from serving.replica import deployment
from serving.replica.loading import Loaded, load_engine


@dataclass
class LeaseMeter:
    """The meter of a process that holds nothing on its GPU."""

    uuid: str
    limit_bytes: int | None
    device_type: str = "fake"
    context_bytes: int = 0

    def held_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 0

    def restart(self) -> None:
        pass


def load_on_cpu(
    spec: ReplicaSpec, fetch: Callable[[Path], None], lease: GpuLease | None = None
) -> Loaded:
    loaded = load_engine(replace(spec, device="cpu"), fetch)
    if lease is not None:
        loaded.engine.backend.meter = LeaseMeter(lease.uuid, lease.bytes)
    return loaded


class GpuReplica(deployment.ModelReplica.func_or_class):  # type: ignore[name-defined, misc]
    """What `load_engine` gives runs on the CPU."""

    async def _load(self) -> None:
        deployment.load_engine = load_on_cpu
        await super()._load()
