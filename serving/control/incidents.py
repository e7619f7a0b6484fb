"""What happens to the replicas of a rollout on their GPUs, as triggers want to know it.

Announcements and reports say how things stand; what is new since the last look is found here. After
a restart of the controller the first look is where it goes on from: rollouts keep what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Final

from serving.control.fleet import Fleet, Replica
from serving.control.gpus import Standing
from serving.core.gpus import Health, XidClass, XidEvent
from serving.core.rollout_counts import ArmName
from serving.core.rollout_facts import CanaryGpu, Incident, IncidentKind

_ILL: Final = frozenset({Health.DEGRADED, Health.FAILED})
_AFTERMATH_S: Final = 10.0
"""An error may be reported after the replica that made it has gone."""
_KINDS: Final = {
    XidClass.APPLICATION: IncidentKind.APPLICATION,
    XidClass.HARDWARE: IncidentKind.HARDWARE,
}


@dataclass
class _Seen:
    """What is known of an application.

    OOMs by replica, fatal errors, XIDs, and GPUs with the time when it last had a replica there.
    """

    ooms: dict[str, int] = field(default_factory=dict)
    fatal: set[str] = field(default_factory=set)
    gpus: dict[str, float] = field(default_factory=dict)
    xids: set[XidEvent] = field(default_factory=set)


class IncidentWatch:
    """Lives on the controller's loop. `standings` are the GPUs as they are now."""

    def __init__(self, fleet: Fleet, standings: Callable[[], Sequence[Standing]]) -> None:
        self._fleet, self._standings = fleet, standings
        self._seen: dict[str, _Seen] = {}
        # What looks have seen that are not confirmed.
        self._looked: dict[str, _Seen] = {}

    def look(self, app: str, arm: ArmName, now: float) -> list[Incident]:
        """What has happened to an application's replicas since the last look that was confirmed.

        `now` is Unix seconds.
        """
        seen = self._looked[app] = deepcopy(self._seen.get(app, _Seen()))
        replicas = self._fleet.of(app)
        return [
            *_ooms(seen, replicas, arm, now),
            *_fatal(seen, replicas, arm, now),
            *self._xids(seen, app, replicas, arm, now),
        ]

    def confirm(self) -> None:
        """What was found since `drop` is kept: the next looks go on from there."""
        self._seen |= self._looked
        self._looked = {}

    def drop(self) -> None:
        """Go by the looks that were confirmed."""
        self._looked = {}

    def gpus(self, app: str) -> tuple[CanaryGpu, ...]:
        """The replicas of an application that are on a GPU, with how that is now."""
        standings = {s.gpu.uuid: s for s in self._standings()}
        replicas = (r for r in self._fleet.of(app) if r.info.get("gpu"))
        return tuple(_gpu_of(r, standings.get(str(r.info["gpu"]))) for r in replicas)

    def ceilings(self, app: str) -> dict[str, int]:
        """The most rows of a run, by replica, of those that learned it."""
        replicas = self._fleet.of(app)
        return {_name(r): int(r.info["ceiling"]) for r in replicas if r.info.get("ceiling")}

    def keep(self, apps: Iterable[str]) -> None:
        """Forget all other applications."""
        kept = set(apps)
        self._seen = {app: seen for app, seen in self._seen.items() if app in kept}

    def _xids(
        self, seen: _Seen, app: str, replicas: Sequence[Replica], arm: ArmName, now: float
    ) -> Iterable[Incident]:
        held = {str(r.info["gpu"]): r for r in replicas if r.info.get("gpu")}
        standings = {s.gpu.uuid: s for s in self._standings()}
        known, seen.gpus = seen.gpus, {**seen.gpus, **dict.fromkeys(held, now)}
        seen.gpus = {u: at for u, at in seen.gpus.items() if now - at <= _AFTERMATH_S}
        for uuid in seen.gpus:
            if (standing := standings.get(uuid)) is None:
                continue
            whole = standings.get(standing.gpu.mig_parent or "")
            events = [*standing.xids, *(whole.xids if whole is not None else ())]
            if uuid not in known:
                # What happened before the replica was there is none of its doing.
                began = now - _up_s(held[uuid])
                seen.xids |= {event for event in events if event.at < began}
            for event in events:
                kind = _KINDS.get(event.kind)
                if event in seen.xids or kind is None:
                    continue
                seen.xids.add(event)
                alone = event.uuid == uuid and all(r.app == app for r in standing.replicas)
                yield Incident(now, kind, arm, gpu=uuid, what=event.sentence, alone=alone)


def _name(replica: Replica) -> str:
    return str(replica.info["replica"])


def _up_s(replica: Replica) -> float:
    usage: Mapping[str, int] = replica.info.get("usage") or {}
    return usage.get("up_ns", 0) / 1e9


def _ooms(seen: _Seen, replicas: Sequence[Replica], arm: ArmName, now: float) -> Iterable[Incident]:
    for replica in replicas:
        life, total = _life(replica), int(replica.info.get("oom_batches") or 0)
        more = total - seen.ooms.setdefault(life, total)
        if more > 0:
            seen.ooms[life] = total
            gpu = str(replica.info.get("gpu") or "")
            yield Incident(now, IncidentKind.OOM, arm, _name(replica), gpu, count=more)


def _fatal(
    seen: _Seen, replicas: Sequence[Replica], arm: ArmName, now: float
) -> Iterable[Incident]:
    for replica in replicas:
        what, life = replica.info.get("fatal"), _life(replica)
        if what and life not in seen.fatal:
            seen.fatal.add(life)
            gpu = str(replica.info.get("gpu") or "")
            yield Incident(now, IncidentKind.FATAL, arm, _name(replica), gpu, what=str(what))


def _life(replica: Replica) -> str:
    """A replica's name and its process: a new process counts from 0."""
    return f"{_name(replica)} {replica.info['pid']}"


def _gpu_of(replica: Replica, standing: Standing | None) -> CanaryGpu:
    gpu = str(replica.info["gpu"])
    if standing is None or standing.sample is None:
        return CanaryGpu(_name(replica), gpu, measured=False)
    condition = standing.condition
    free, of = min(_free(replica, standing), default=(None, ""))
    ill = "; ".join(condition.reasons) if condition.health in _ILL else ""
    return CanaryGpu(_name(replica), gpu, True, ill, free, of)


def _free(replica: Replica, standing: Standing) -> Iterable[tuple[float, str]]:
    """Free shares of memory, as far as they are known."""
    sample, total = standing.sample, standing.gpu.memory_bytes
    if sample is None:
        return
    if total and sample.memory_used is not None:
        taken = sample.memory_used + (sample.memory_reserved or 0.0)
        yield max(0.0, 1.0 - taken / total), "its GPU's memory"
    lease, pid = replica.info.get("lease_bytes"), replica.info.get("pid")
    for process in sample.processes or ():
        if lease and process.pid == pid and process.memory_bytes is not None:
            yield max(0.0, 1.0 - process.memory_bytes / int(lease)), "its lease"
