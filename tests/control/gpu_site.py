"""A world with GPUs: agents that report them, and replicas that ask for leases and hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving.control.controller import Controller
from serving.core.gpus import Gpu, GpuProcess, GpuSample, NodeReport, XidEvent
from serving.errors import DeviceError, Unavailable
from tests.control.rollout_world import RolloutWorld

GIB = 1 << 30


@dataclass
class FakeGpu:
    """A GPU, which with 0 GiB reports no memory of its own.

    `others` are bytes that a process of somebody else has, `own` what replicas have.
    """

    uuid: str
    gib: float = 24.0
    name: str = "NVIDIA L4"
    others: int = 0
    own: int = 0
    throttle: tuple[str, ...] = ()
    node: str = "node"
    divided: bool = False
    mig_parent: str | None = None

    def report(self) -> tuple[Gpu, GpuSample]:
        gpu = Gpu(
            uuid=self.uuid,
            node=self.node,
            index=0,
            name=self.name,
            memory_bytes=int(self.gib * GIB) or None,
            mig_parent=self.mig_parent,
            divided=self.divided,
        )
        # Every replica of this world has process 1.
        both = (GpuProcess(9999, self.others), GpuProcess(1, self.own))
        processes = tuple(p for p in both if p.memory_bytes)
        used = float(self.others + self.own) if self.gib else None
        reserved = None if used is None else 0.0
        return gpu, GpuSample(
            0.0, memory_used=used, memory_reserved=reserved,
            throttle=self.throttle, processes=processes,
        )  # fmt: skip


@dataclass
class GpuWorld(RolloutWorld):
    """Replicas lease what they are granted as soon as they start.

    `says` has what replicas of a version say besides, `xids` what agents report next.
    """

    gpus: list[FakeGpu] = field(default_factory=list)
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    says: dict[str, dict[str, Any]] = field(default_factory=dict)
    xids: list[XidEvent] = field(default_factory=list)

    async def measure(self, controller: Controller) -> None:
        """Every agent reports."""
        for gpu in self.gpus:
            gpu.own = sum(x["bytes"] // 2 for x in self.held.values() if x.get("uuid") == gpu.uuid)
        for node in {g.node for g in self.gpus}:
            found = tuple(g.report() for g in self.gpus if g.node == node)
            xids, self.xids = tuple(self.xids), []
            await controller.gpus.report(NodeReport(node, node, gpus=found, xids=xids).to_dict())

    async def second(self, controller: Controller) -> None:
        await self.measure(controller)
        await super().second(controller)

    async def begin(self, models: dict[str, Any]) -> Controller:
        """A controller that knows the GPUs, and serves `models`."""
        controller = await self.controller()
        await self.measure(controller)
        await self.apply(controller, models)
        await self.seconds(controller, 4)
        return controller

    def announce(self, controller: Controller) -> None:
        for info in self.cluster.announcements():
            replica = info["replica"]
            if info["state"] == "draining":
                controller.announce(info)
                controller.placer.book.release(replica)
                self.held.pop(replica, None)
                continue
            if replica not in self.held:
                try:
                    lease = controller.lease_gpu(info["app"], replica, info["node"], info["pid"])
                except Unavailable:
                    continue
                except DeviceError as error:
                    controller.announce({**info, "state": "failed", "error": str(error)})
                    continue
                self.held[replica] = lease or {}
            lease = self.held[replica]
            gpu = {"gpu": lease.get("uuid"), "lease_bytes": lease.get("bytes")}
            more = self.says.get(info["version"], {})
            controller.announce({**info, **gpu, "profile": self.profile, **more})


def model(version: str, gib: float, **more: Any) -> dict[str, Any]:
    return {"version": version, "gpu_memory_bytes": int(gib * GIB), "replicas": 1, **more}


def where(plan: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """The GPUs of each version."""
    return {
        (row["model"], row["version"]): [slot["uuid"] for slot in row["slots"]]
        for row in plan["models"]
    }


def shown(plan: dict[str, Any], uuid: str) -> dict[str, Any]:
    return next(g for g in plan["gpus"] if g["uuid"] == uuid)
