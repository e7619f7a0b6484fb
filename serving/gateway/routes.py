"""The gateway's copy of the route table: which path goes to which version.

A table is applied whole. Versions that stay keep their queue, counters and connections; versions
that leave finish what they hold. If the controller is away the last table stays: fail static.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from typing import Any

from serving.core.inference import Limits
from serving.core.routing import Arm, Endpoint, RouteTable
from serving.errors import NotFound
from serving.gateway.batcher import ArmBatcher
from serving.gateway.infer import Call
from serving.gateway.links import ReplicaLink
from serving.gateway.recorder import ArmRecorder

_ArmKey = tuple[str, str, str]


class Routes:
    """The table in force and a batcher per version in it."""

    def __init__(
        self,
        *,
        gateway: str,
        node: str,
        limits: Limits,
        tls: Callable[[], ssl.SSLContext],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.table = RouteTable()
        self.infer_paths: dict[bytes, ArmBatcher] = {}
        self._arms: dict[_ArmKey, ArmBatcher] = {}
        self._retired: list[ArmBatcher] = []
        # Totals outlive their batcher: a version that left and comes back goes on counting.
        self._recorders: dict[_ArmKey, ArmRecorder] = {}
        self._gateway = gateway
        self._node = node
        self._limits = limits
        self._tls = tls
        self._loop = loop

    @property
    def ready(self) -> bool:
        """Whether a table is there and every default version in it has a connected replica."""
        return self.table.revision > 0 and all(
            m.version in m.arms and self.arm(m.name).ready for m in self.table.models.values()
        )

    def batchers(self) -> Iterator[ArmBatcher]:
        """All batchers, those of leaving versions too, as a snapshot."""
        return iter([*self._arms.values(), *self._retired])

    def arm(self, model: str, version: str | None = None) -> ArmBatcher:
        """The batcher that answers for a model. Raises `NotFound`."""
        route = self.table.models.get(model)
        if route is None:
            raise NotFound(f"Request for unknown model: {model!r} is not found")
        version = route.version if version is None else version
        arm = route.arms.get(version)
        if arm is None:
            raise NotFound(
                f"Request for unknown model: {model!r} version {version!r} is not found; "
                f"served versions: {', '.join(sorted(route.arms, key=int))}"
            )
        return self._arms[_key(arm)]

    def apply(self, table: RouteTable) -> None:
        """Replace the table. An older revision than the one in force is ignored."""
        if table.revision <= self.table.revision:
            return
        arms: dict[_ArmKey, ArmBatcher] = {}
        for route in table.models.values():
            for arm in route.arms.values():
                arms[_key(arm)] = self._batcher(arm)
        left = [batcher for key, batcher in self._arms.items() if key not in arms]
        self.table, self._arms = table, arms
        self.infer_paths = dict(self._paths())
        for batcher in arms.values():
            batcher.connect(batcher.arm.endpoints, self._link)
        for batcher in left:
            batcher.retire()
        self._retired = [b for b in [*self._retired, *left] if not b.closed]

    def _batcher(self, arm: Arm) -> ArmBatcher:
        batcher = self._arms.get(_key(arm))
        if batcher is None:
            recorder = self._recorders.setdefault(_key(arm), ArmRecorder())
            return ArmBatcher(arm, recorder, self._limits, self._loop)
        if batcher.arm != arm:
            batcher.configure(arm)
        return batcher

    def _paths(self) -> Iterator[tuple[bytes, ArmBatcher]]:
        for route in self.table.models.values():
            base = f"/v2/models/{route.name}"
            if route.version in route.arms:
                yield f"{base}/infer".encode(), self.arm(route.name)
            for version in route.arms:
                path = f"{base}/versions/{version}/infer"
                yield path.encode(), self.arm(route.name, version)

    def _link(self, owner: ArmBatcher, endpoint: Endpoint) -> ReplicaLink[list[Call]]:
        return ReplicaLink(
            owner,
            endpoint,
            gateway=self._gateway,
            node=self._node,
            digest=owner.arm.digest,
            tls=self._tls,
            loop=self._loop,
        )

    def report(self) -> list[dict[str, Any]]:
        """Totals and gauges, one entry a version, those that have left too."""
        gauges: dict[_ArmKey, list[ArmBatcher]] = {key: [] for key in self._recorders}
        for batcher in self.batchers():
            gauges[_key(batcher.arm)].append(batcher)
        return [
            {
                "model": model,
                "version": version,
                "digest": digest,
                **self._recorders[model, version, digest].to_dict(),
                "queue_depth": sum(b.queue_depth for b in batchers),
                "in_flight": sum(b.in_flight for b in batchers),
                "replicas_connected": sum(b.replicas_connected for b in batchers),
            }
            for (model, version, digest), batchers in gauges.items()
        ]

    async def close(self) -> None:
        """Drop all connections to replicas. Every request must have been answered."""
        tasks = [task for batcher in self.batchers() for task in batcher.close()]
        await asyncio.gather(*tasks, return_exceptions=True)


def _key(arm: Arm) -> _ArmKey:
    return (arm.model, arm.version, arm.digest)
