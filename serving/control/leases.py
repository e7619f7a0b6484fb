"""The book of GPU leases: which replica may use how much of which GPU.

A replica asks for a lease before it loads anything, and goes on asking for it while it lives: to
ask again is to renew. One that is not heard of for `EXPIRY_S` has vanished, and its share is free.
The book is rebuilt from what replicas say, so it need not be saved.

A replica that is on its way out keeps its room until it gives it back, but is none of those that
are wanted: whoever comes in its place has a place of its own, or waits.

Where replicas go is `place`'s decision, made anew from the leases each time. What runs comes first,
so that the replacement of a lost replica finds its room: nobody is placed on it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from serving.core.placement import Demand, Device, Placement, place
from serving.core.replica import GpuLease
from serving.errors import DeviceError, Unavailable

EXPIRY_S: Final = 8.0
"""Four renewals."""

Wave = Sequence[Demand]
"""Demands without their `kept`, which the book knows."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One replica's share of a GPU. `pid` is that of its process, on its node.

    `estimated`: nobody has measured what the version takes. `heard_at` is monotonic, in seconds;
    `since` is Unix time.
    """

    terms: GpuLease
    app: str
    replica: str
    node: str
    pid: int
    estimated: bool
    since: float
    heard_at: float


@dataclass(frozen=True, slots=True)
class Applicant:
    """A replica that asks for a GPU of its node. `key` becomes the lease's id."""

    app: str
    replica: str
    node: str
    pid: int
    key: str


@dataclass
class LeaseBook:
    """The leases, by replica. Not thread-safe: it lives on the controller's loop.

    `departing` names the replicas that are on their way out.
    """

    departing: Callable[[], Collection[str]] = frozenset
    _leases: dict[str, Lease] = field(default_factory=dict)
    _released: dict[str, Lease] = field(default_factory=dict)

    @property
    def leases(self) -> list[Lease]:
        """All of them, by application and replica."""
        return sorted(self._leases.values(), key=lambda x: (x.app, x.replica))

    @property
    def released(self) -> list[Lease]:
        """Leases that ended within about `EXPIRY_S`: their processes may still be there."""
        return list(self._released.values())

    def on(self, uuid: str) -> list[Lease]:
        """The leases on a GPU."""
        return [lease for lease in self.leases if lease.terms.uuid == uuid]

    def staying(self, app: str) -> list[Lease]:
        """The leases of an application's replicas, but for those on their way out."""
        departing = self.departing()
        return [x for x in self.leases if x.app == app and x.replica not in departing]

    def plan(
        self,
        devices: Sequence[Device],
        waves: Sequence[Wave],
        *,
        without: Iterable[str] = (),
        vacated: bool = False,
    ) -> Placement:
        """Where each demand goes; the first wave chooses first. Changes nothing.

        Leases of applications that no wave names still take their room, and so do those of replicas
        on their way out; but not those of applications `without`, which are about to go, and none
        with `vacated`: as if all that is to go were gone.
        """
        gone = frozenset(without)
        devices = self._measured_by_leases(devices, waves)
        planned: list[Demand] = [] if vacated else self._others(waves, gone)
        slots: dict[str, tuple[str, ...]] = {}
        refused: dict[str, str] = {}
        for wave in waves:
            demands = [self._with_kept(d) for d in wave]
            placed = place(devices, [*planned, *demands])
            slots |= {d.app: placed.slots[d.app] for d in demands}
            refused |= placed.refused
            planned += [replace(d, replicas=0, kept=placed.slots[d.app]) for d in demands]
        return Placement(slots, refused)

    def lease(
        self,
        who: Applicant,
        devices: Sequence[Device],
        waves: Sequence[Wave],
        *,
        estimated: bool,
        now: float,
        unix: float,
        ceiling: Callable[[str, int], int | None] = lambda *_: None,
        later: Sequence[Device] = (),
    ) -> Lease:
        """Grant a share, or renew the one that the replica has.

        It is one that was planned for its node; where there is none, any that its node has room
        for. `ceiling` gives what was learned for a type of device and the bytes of a lease; `later`
        has the devices as they will be without the processes of `released` leases. Raises
        `DeviceError` with the numbers where there is no room, or where no wave names the
        application; `Unavailable` where there will be room once those are
        gone that are to go.
        """
        if self.renew(who.replica, now):
            return self._leases[who.replica]
        demand = next((d for wave in waves for d in wave if d.app == who.app), None)
        if demand is None:
            raise DeviceError(f"{who.app} has no claim to a GPU: it is not to run")
        uuid = self._slot(who, demand, devices, waves, later or devices)
        device = next(d for d in devices if d.uuid == uuid)
        total, most = device.memory_bytes, ceiling(device.type, demand.bytes)
        terms = GpuLease(who.key, uuid, demand.bytes, total, most)
        lease = Lease(terms, who.app, who.replica, who.node, who.pid, estimated, unix, now)
        self._leases[who.replica] = lease
        return lease

    def renew(self, replica: str, now: float) -> bool:
        """A replica was heard of; whether it has a lease."""
        if (held := self._leases.get(replica)) is None:
            return False
        self._leases[replica] = replace(held, heard_at=now)
        return True

    def restore(self, lease: Lease) -> None:
        """Take a replica's word for what it holds: an earlier controller granted it."""
        self._leases[lease.replica] = lease

    def release(self, replica: str) -> None:
        """A replica is done with its share."""
        if (held := self._leases.pop(replica, None)) is not None:
            self._released[replica] = held

    def expire(self, now: float) -> list[Lease]:
        """Free the shares of replicas that have vanished; which those were."""
        self._released = {
            r: lease for r, lease in self._released.items() if now - lease.heard_at <= EXPIRY_S
        }
        vanished = [lease for lease in self.leases if now - lease.heard_at > EXPIRY_S]
        for lease in vanished:
            self._released[lease.replica] = replace(self._leases.pop(lease.replica), heard_at=now)
        return vanished

    def measured(self, app: str, need: int) -> None:
        """What an application takes is known now: give back what estimated leases have too much.

        A lease never grows: its replica is capped at it, and lives within it.
        """
        for replica, lease in self._leases.items():
            if lease.app == app and lease.estimated:
                terms = replace(lease.terms, bytes=min(need, lease.terms.bytes))
                self._leases[replica] = replace(lease, terms=terms, estimated=False)

    def _with_kept(self, demand: Demand) -> Demand:
        return replace(demand, kept=tuple(x.terms.uuid for x in self.staying(demand.app)))

    def _measured_by_leases(self, devices: Sequence[Device], waves: Sequence[Wave]) -> list[Device]:
        """The devices, with the leases of demands taking what was granted.

        `place` takes a demand's bytes for them; since they were granted these may have changed.
        """
        more = dict.fromkeys((d.uuid for d in devices), 0)
        for app, size in {d.app: d.bytes for wave in waves for d in wave}.items():
            for lease in self.staying(app):
                if lease.terms.uuid in more:
                    more[lease.terms.uuid] += lease.terms.bytes - size
        return [replace(d, used_by_others=d.used_by_others + more[d.uuid]) for d in devices]

    def _others(self, waves: Sequence[Wave], gone: frozenset[str]) -> list[Demand]:
        """The leases of none that is wanted, as demands that want nothing more."""
        named = {d.app for wave in waves for d in wave}
        departing = self.departing()
        return [
            Demand(
                app=f"{lease.app} {lease.replica}",
                model="",
                version="",
                replicas=0,
                bytes=lease.terms.bytes,
                kept=(lease.terms.uuid,),
            )
            for lease in self.leases
            if lease.app not in gone and (lease.app not in named or lease.replica in departing)
        ]

    def _slot(
        self,
        who: Applicant,
        demand: Demand,
        devices: Sequence[Device],
        waves: Sequence[Wave],
        later: Sequence[Device],
    ) -> str:
        plan = self.plan(devices, waves)
        here = {d.uuid for d in devices if d.node == who.node}
        held = self._with_kept(demand).kept
        for uuid in plan.slots[who.app][len(held) :]:
            if uuid in here:
                return uuid
        # Ray has put it elsewhere, or the replica that it replaces is not known to be gone yet.
        others = [
            replace(d, replicas=0, kept=plan.slots[d.app])
            for wave in waves
            for d in wave
            if d.app != who.app
        ]
        one_more = replace(demand, replicas=len(held) + 1, kept=held)
        near, then = (
            [d for d in self._measured_by_leases(of, waves) if d.node == who.node]
            for of in (devices, later)
        )
        going = self._others(waves, frozenset())
        found = place(near, [*going, *others, one_more])
        if who.app not in found.refused:
            return found.slots[who.app][-1]
        where = f"model {demand.model!r} version {demand.version} on node {who.node}"
        if who.app in place(then, [*others, one_more]).refused:
            raise DeviceError(f"{where}: {found.refused[who.app]}")
        raise Unavailable(f"{where}: {found.refused[who.app]}; it waits for what is to go")
