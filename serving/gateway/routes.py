"""The gateway's copy of the route table: which path goes to which version.

A table is applied whole. Versions that stay keep their queue, counters and connections; versions
that leave finish what they hold. If the controller is away the last table stays: fail static.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Final

from serving.core.inference import Limits
from serving.core.routing import Arm, Endpoint, RouteTable
from serving.errors import NotFound, ServingError, Unavailable
from serving.gateway.batcher import ArmBatcher
from serving.gateway.infer import Call, monotonic
from serving.gateway.links import ReplicaLink
from serving.gateway.recorder import ArmRecorder
from serving.gateway.splitter import Splitter
from serving.tenant_settings import DEFAULT_TENANT

_ArmKey = tuple[str, str, str]
# How long after the end of a split its last answers may come.
_LATE_S: Final = 120.0


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
        tenant: str | None = DEFAULT_TENANT,
    ) -> None:
        """`tenant` is the only one that there is; None if requests say whose they are."""
        self.table = RouteTable()
        self.infer_paths: dict[bytes, ArmBatcher | Splitter] = {}
        # The request headers that some split depends on.
        self.headers: frozenset[bytes] = frozenset()
        # What splitters report to: a new deadline, and a canary that was cut off.
        self.watch: Callable[[float], None] = _ignore
        self.breaker_opened: Callable[[], None] = _ignore
        # A version without replicas is asked for.
        self.wake: Callable[[], None] = _ignore
        # By rollout; and of the table in force, by model.
        self._splitters: dict[str, Splitter] = {}
        self._splits: dict[str, Splitter] = {}
        # Splits that ended, and since when: late answers are still counted.
        self._ended: dict[str, float] = {}
        self._arms: dict[_ArmKey, ArmBatcher] = {}
        self._retired: list[ArmBatcher] = []
        # Totals outlive their batcher: a version that left and comes back goes on counting.
        self._recorders: dict[_ArmKey, ArmRecorder] = {}
        self._gateway = gateway
        self._node = node
        self._tenant = tenant
        self._limits = limits
        self._tls = tls
        self._loop = loop

    @property
    def complete(self) -> bool:
        """Whether all versions that the deployment began with are known."""
        return self.table.revision > 0 and self.table.complete

    @property
    def ready(self) -> bool:
        """Whether a complete table is there and every default version accepts requests."""
        table = self.table
        return self.complete and all(
            m.version in m.arms and self.arm(m.name).accepts for m in table.models.values()
        )

    def batchers(self) -> Iterator[ArmBatcher]:
        """All batchers, those of leaving versions too, as a snapshot."""
        return iter([*self._arms.values(), *self._retired])

    def arm(self, model: str, version: str | None = None) -> ArmBatcher:
        """The batcher that answers for a model.

        Raises `NotFound`, or `Unavailable` as long as it may still come.
        """
        route = self.table.models.get(model)
        if route is None:
            raise self._unknown(repr(model))
        version = route.version if version is None else version
        arm = route.arms.get(version)
        if arm is None:
            served = ", ".join(sorted(route.arms, key=int))
            raise self._unknown(f"{model!r} version {version!r}", f"; served versions: {served}")
        return self._arms[_key(arm)]

    def _unknown(self, what: str, served: str = "") -> ServingError:
        if self.complete:
            return NotFound(f"Request for unknown model: {what} is not found{served}")
        return Unavailable(
            f"{what} is not served yet: this deployment is still starting{served}",
            retry_after_s=1.0,
        )

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
        self._split()
        self.infer_paths = dict(self._paths())
        for batcher in arms.values():
            batcher.connect(batcher.arm.endpoints, self._link)
        for batcher in left:
            batcher.retire(self._default(batcher.arm.model))
        self._retired = [b for b in [*self._retired, *left] if not b.closed]

    def _default(self, model: str) -> ArmBatcher | None:
        """What answers for a model where no version is named, if anything does."""
        try:
            return self.arm(model)
        except ServingError:
            return None

    def _batcher(self, arm: Arm) -> ArmBatcher:
        batcher = self._arms.get(_key(arm))
        if batcher is None:
            recorder = self._recorders.setdefault(_key(arm), ArmRecorder(self._tenant))
            return ArmBatcher(arm, recorder, self._limits, self._loop, lambda: self.wake())
        if batcher.arm != arm:
            batcher.configure(arm)
        return batcher

    def _split(self) -> None:
        """Make the splitters match the route table."""
        now = monotonic()
        splits: dict[str, Splitter] = {}
        for route in self.table.models.values():
            split = route.split
            if split is None or split.canary not in route.arms:
                continue
            stable, canary = self.arm(route.name, route.version), self.arm(route.name, split.canary)
            splitter = self._splitters.get(split.rollout)
            if splitter is None:
                splitter = Splitter(
                    split,
                    stable,
                    canary,
                    loop=self._loop,
                    watch=self.watch,
                    breaker_opened=self.breaker_opened,
                )
            else:
                splitter.configure(split, stable, canary)
            splits[route.name] = splitter
        current = {splitter.rollout: splitter for splitter in splits.values()}
        ended = {r: self._ended.get(r, now) for r in self._splitters if r not in current}
        self._ended = {r: since for r, since in ended.items() if now - since < _LATE_S}
        lately = {rollout: self._splitters[rollout] for rollout in self._ended}
        self._splits, self._splitters = splits, {**lately, **current}
        headers = frozenset().union(*(s.headers for s in splits.values()))
        if headers != self.headers:
            # Known heads go by identity.
            self.headers = headers

    def target(self, model: str, version: str | None = None) -> ArmBatcher | Splitter:
        """Where a request for a model goes. Raises as `arm` does."""
        arm = self.arm(model, version)
        return arm if version is not None else self._splits.get(model, arm)

    def _paths(self) -> Iterator[tuple[bytes, ArmBatcher | Splitter]]:
        for route in self.table.models.values():
            base = f"/v2/models/{route.name}"
            if route.version in route.arms:
                yield f"{base}/infer".encode(), self.target(route.name)
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

    def report_rollouts(self) -> dict[str, list[dict[str, Any]]]:
        """What rollouts learn here.

        Counts a trial and replica, what shadow traffic compared an epoch, a summary a rollout.
        """
        splitters = self._splitters.values()
        return {
            "trials": [row for splitter in splitters for row in splitter.report()],
            "shadows": [row for splitter in splitters for row in splitter.shadow.report()],
            "splits": [splitter.summary() for splitter in splitters],
        }

    def feedback(self, items: Iterable[Mapping[str, Any]]) -> list[str]:
        """Join labels, items {"request_id", "label"}, to what was answered here.

        Returns the ids that are known here, joined before perhaps.
        """
        known = []
        for item in items:
            request_id = str(item["request_id"])
            key = request_id.encode("latin-1", "replace")
            if any(s.memory.join(key, item["label"]) for s in self._splitters.values()):
                known.append(request_id)
        return known

    def stop_shadows(self) -> None:
        """Send no more copies to canaries."""
        for splitter in self._splitters.values():
            splitter.shadow.stop()

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
                "waiting": sum(b.waiting for b in batchers),
                "in_flight": sum(b.in_flight for b in batchers),
                "replicas_connected": sum(b.replicas_connected for b in batchers),
            }
            for (model, version, digest), batchers in gauges.items()
        ]

    def report_usage(self) -> list[dict[str, Any]]:
        """Device time by replica; see `UsageMeter`."""
        return [row for recorder in self._recorders.values() for row in recorder.usage.report()]

    def heard(self) -> None:
        """The controller has a report: replicas and epochs that are gone are told of no more."""
        for splitter in self._splitters.values():
            splitter.heard(self._outstanding)
        there = {e.replica for batcher in self.batchers() for e in batcher.links}
        for recorder in self._recorders.values():
            recorder.usage.forget(there)

    def _outstanding(self) -> Iterator[Call]:
        return chain.from_iterable(batcher.outstanding() for batcher in self.batchers())

    async def close(self) -> None:
        """Drop all connections to replicas. Every request must have been answered."""
        tasks = [task for batcher in self.batchers() for task in batcher.close()]
        await asyncio.gather(*tasks, return_exceptions=True)


def _ignore(*_: object) -> None:
    """Nobody listens yet."""


def _key(arm: Arm) -> _ArmKey:
    return (arm.model, arm.version, arm.digest)
