"""The GPUs of all nodes: what their agents said last, who runs where, and which are cordoned.

Nothing new starts on a cordoned GPU, and what runs there moves (`control/mover.py`). A person
cordons one, or the controller does: after an error of its hardware, and after two errors of its
firmware or two fatal CUDA errors within an hour. One alone does not tell that the GPU is at fault.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from serving.control.fleet import Fleet, Replica
from serving.control.reconcile import Blocking, Clock
from serving.core.gpus import Condition, Gpu, GpuSample, NodeReport, XidEvent, condition, faults
from serving.core.rollout import CONTROLLER
from serving.errors import ConflictError, InvalidRequest, NotFound
from serving.store.audit import AuditEntry
from serving.store.cordons import CordonRow
from serving.store.gpu_errors import FatalErrorRow
from serving.store.sql import Store

STALE_S: Final = 5.0
"""How old a node's last report may be for its samples to be believed."""
FORGET_S: Final = 60.0
"""A node that has been silent for so long is gone, unless Ray still counts it."""
FATAL_WINDOW_S: Final = 3600.0
FATAL_LIMIT: Final = 2
_KEPT_XIDS: Final = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """A GPU as the controller sees it now.

    `sample` is None where there is no fresh one. `age_s` is how long ago its node was heard.
    `cordon` is its own or, for a MIG slice, that of its GPU. `xids` are the latest errors, oldest
    first.
    """

    gpu: Gpu
    host: str
    age_s: float
    sample: GpuSample | None
    condition: Condition
    cordon: CordonRow | None
    replicas: tuple[Replica, ...]
    xids: tuple[XidEvent, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A node that has GPUs. `age_s` is None, and `driver` too, where its agent was never heard."""

    node: str
    host: str
    driver: str | None
    age_s: float | None
    problem: str


@dataclass(frozen=True, slots=True)
class _Heard:
    report: NodeReport
    at: float


class Gpus:
    """The inventory. Lives on the controller's loop.

    `counted`: whether Ray has said by now on which nodes there are GPUs.
    """

    def __init__(self, fleet: Fleet, *, store: Store, in_store: Blocking, clock: Clock) -> None:
        self._fleet, self._store, self._in_store, self._clock = fleet, store, in_store, clock
        self._nodes: dict[str, _Heard] = {}
        self._expected: dict[str, float] = {}
        self.counted = False
        self._cordons: dict[str, CordonRow] = {}
        self._unsaved: list[CordonRow] = []
        self._xids: dict[str, deque[XidEvent]] = {}
        self._counts: Counter[tuple[str, int]] = Counter()
        self._fatal: dict[str, dict[str, float]] = {}
        self._unsaved_fatal: list[FatalErrorRow] = []
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Take up the cordons and fatal errors that were saved. Raises `StoreError`."""
        self._cordons = {row.uuid: row for row in await self._in_store(self._store.cordons)}
        since = self._clock.unix() - FATAL_WINDOW_S
        for row in await self._in_store(self._store.fatal_gpu_errors, since):
            self._fatal.setdefault(row.uuid, {})[row.replica] = row.at

    # What agents and replicas say.

    def expect(self, nodes: Mapping[str, float]) -> None:
        """So many GPUs these nodes have, Ray says."""
        self._expected, self.counted = dict(nodes), True

    @property
    def counted_by_ray(self) -> Mapping[str, float]:
        """What Ray counts of GPUs, by node."""
        return self._expected

    async def report(self, raw: Mapping[str, Any]) -> None:
        """Take a node's report: `NodeReport.to_dict`. Raises `StoreError`.

        Once it returns, every cordon that the report leads to is stored.
        """
        report = NodeReport.from_dict(raw)
        before = self._nodes.get(report.node)
        old = {g.uuid: s for g, s in before.report.gpus} if before is not None else {}
        fresh = self._remember(report.xids)
        for uuid in dict.fromkeys([*(g.uuid for g, _ in report.gpus), *(e.uuid for e in fresh)]):
            sample = next((s for g, s in report.gpus if g.uuid == uuid), None)
            events = [event for event in fresh if event.uuid == uuid]
            earlier = [e for e in self._xids.get(uuid, ()) if e not in events]
            # An error may come before the first measurement.
            found = faults(old.get(uuid), sample or GpuSample(0.0), events, earlier)
            if found and uuid:
                self._cordon_by_itself(uuid, "; ".join(found))
        self._nodes[report.node] = _Heard(report, self._clock.monotonic())
        await self.flush()

    def heard(self, info: Mapping[str, Any]) -> None:
        """A replica's announcement: one with a fatal CUDA error counts against its GPU."""
        if not (info.get("gpu") and info.get("fatal")):
            return
        uuid, replica, now = str(info["gpu"]), str(info["replica"]), self._clock.unix()
        found = self._fatal.get(uuid, {})
        found = {name: at for name, at in found.items() if now - at <= FATAL_WINDOW_S}
        # A replica ends after its first one, but may say so more than once.
        if replica not in found:
            found[replica] = now
            self._unsaved_fatal.append(FatalErrorRow(uuid, replica, now))
        self._fatal[uuid] = found
        if len(found) >= FATAL_LIMIT:
            why = f"{len(found)} fatal CUDA errors within an hour, the last one: {info['fatal']}"
            self._cordon_by_itself(uuid, why)

    async def flush(self) -> None:
        """Store the cordons of the controller's own, and what may lead to some.

        Raises `StoreError`; then they are due yet.
        """
        if self._unsaved or self._unsaved_fatal:
            async with self._lock:
                await self._save_own()

    def _remember(self, xids: Sequence[XidEvent]) -> list[XidEvent]:
        """Those that are new: a report that seemed lost comes twice."""
        fresh = []
        for event in xids:
            known = self._xids.setdefault(event.uuid, deque(maxlen=_KEPT_XIDS))
            if event not in known:
                known.append(event)
                fresh.append(event)
                self._counts[event.uuid, event.xid] += 1
        return fresh

    def _cordon_by_itself(self, uuid: str, reason: str) -> None:
        if uuid in self._cordons:
            return
        log.error("GPU %s is cordoned: %s", uuid, reason)
        row = CordonRow(uuid, reason, CONTROLLER, self._clock.unix())
        self._cordons[uuid] = row
        self._unsaved.append(row)

    async def _save_own(self) -> None:
        if errors := list(self._unsaved_fatal):
            since = self._clock.unix() - FATAL_WINDOW_S
            await self._in_store(self._store.save_fatal_gpu_errors, errors, since)
            del self._unsaved_fatal[: len(errors)]
        rows = list(self._unsaved)
        if not rows:
            return
        entries = [_entry("cordon", row) for row in rows]
        await self._in_store(self._store.save_cordons, rows, [], entries)
        del self._unsaved[: len(rows)]

    # What an operator asks for.

    async def cordon(self, name: str, *, actor: str, reason: str) -> str:
        """Let nothing new start on a GPU, named by UUID or the unique beginning of one.

        Returns the UUID. Raises `NotFound`, `InvalidRequest` or `StoreError`.
        """
        uuid = self._resolve(name)
        async with self._lock:
            await self._save_own()
            row = CordonRow(uuid, reason, actor, self._clock.unix())
            await self._in_store(self._store.save_cordons, [row], [], [_entry("cordon", row)])
            self._cordons[uuid] = row
        return uuid

    async def uncordon(self, name: str, *, actor: str, reason: str) -> str:
        """Put a GPU back to use; what was held against it is forgotten.

        Returns the UUID. Raises `NotFound`, `InvalidRequest`, `ConflictError` where it is not
        cordoned, or `StoreError`.
        """
        uuid = self._resolve(name)
        async with self._lock:
            await self._save_own()
            if uuid not in self._cordons:
                raise ConflictError(self._why_not_lifted(uuid))
            row = CordonRow(uuid, reason, actor, self._clock.unix())
            await self._in_store(self._store.save_cordons, [], [uuid], [_entry("uncordon", row)])
            del self._cordons[uuid]
            self._xids.pop(uuid, None)
            self._fatal.pop(uuid, None)
        return uuid

    def _resolve(self, name: str) -> str:
        known = sorted({*(s.gpu.uuid for s in self.standings()), *self._cordons})
        found = [u for u in known if u == name] or [u for u in known if u.startswith(name)]
        if not found:
            there = f"there are: {', '.join(known)}" if known else "there is none on any node"
            raise NotFound(f"no GPU {name!r}; {there}")
        if len(found) > 1:
            raise InvalidRequest(f"{name!r} is the beginning of {', '.join(found)}; write more")
        return found[0]

    def _why_not_lifted(self, uuid: str) -> str:
        found = self.standing(uuid)
        if found is not None and found.cordon is not None:
            return f"{uuid} is cordoned with its GPU; uncordon that: {found.cordon.uuid}"
        return f"{uuid} is not cordoned"

    # What there is.

    def standings(self) -> list[Standing]:
        """Every GPU of every node that is there, by host and index, each before its slices."""
        now = self._clock.monotonic()
        running: dict[str, list[Replica]] = {}
        for replica in self._fleet.replicas():
            running.setdefault(str(replica.info.get("gpu")), []).append(replica)
        return [s for heard in self._present(now) for s in self._of_node(heard, now, running)]

    def standing(self, uuid: str) -> Standing | None:
        """That of one GPU, if it is there."""
        return next((s for s in self.standings() if s.gpu.uuid == uuid), None)

    def nodes(self) -> list[Node]:
        """Every node with GPUs, by host; those whose agent was never heard at the end."""
        now = self._clock.monotonic()
        present = self._present(now)
        found = []
        for heard in present:
            report, age = heard.report, now - heard.at
            problem = report.problem or (_silence(age) if age > STALE_S else "")
            found.append(Node(report.node, report.host, report.driver, age, problem))
        unheard = self._expected.keys() - {heard.report.node for heard in present}
        missing = "Ray counts GPUs here, but no agent has reported them"
        return found + [Node(node, "", None, None, missing) for node in sorted(unheard)]

    def absent_cordons(self) -> list[CordonRow]:
        """Cordons of GPUs that are on no node now."""
        there = {s.gpu.uuid for s in self.standings()}
        return [row for uuid, row in sorted(self._cordons.items()) if uuid not in there]

    def xid_counts(self) -> Mapping[tuple[str, int], int]:
        """How often (UUID, XID) has happened since the controller started."""
        return self._counts

    def _present(self, now: float) -> list[_Heard]:
        for node, heard in list(self._nodes.items()):
            if now - heard.at > FORGET_S and node not in self._expected:
                del self._nodes[node]
        return sorted(self._nodes.values(), key=lambda h: (h.report.host, h.report.node))

    def _of_node(
        self, heard: _Heard, now: float, running: Mapping[str, Sequence[Replica]]
    ) -> Iterator[Standing]:
        report, age = heard.report, now - heard.at
        silence = report.problem or (_silence(age) if age > STALE_S else "")
        wholes: dict[str, Standing] = {}
        for gpu, last in report.gpus:
            sample = None if silence else last
            xids = tuple(self._xids.get(gpu.uuid, ()))
            found = Standing(
                gpu,
                report.host,
                age,
                sample,
                condition(sample, xids, silence),
                self._cordons.get(gpu.uuid),
                tuple(running.get(gpu.uuid, ())),
                xids,
            )
            whole = wholes.get(gpu.mig_parent or "")
            found = found if whole is None else _with_whole(found, whole)
            wholes[gpu.uuid] = found
            yield found


def _with_whole(part: Standing, whole: Standing) -> Standing:
    """A slice with what is true of its whole GPU: a hot one slows all of its slices."""
    return replace(
        part,
        cordon=part.cordon or whole.cordon,
        condition=part.condition.joined(whole.condition),
    )


def _silence(age_s: float) -> str:
    return f"its node's agent was last heard {age_s:.0f} s ago"


def _entry(action: str, row: CordonRow) -> AuditEntry:
    return AuditEntry(row.at, row.actor, action, row.uuid, {"reason": row.reason})
