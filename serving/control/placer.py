"""Placement as the controller does it: who is to run, on which GPUs, and the leases of who does.

Where no GPU is known there is nothing to place: a replica that needs one says so itself.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, Final

from serving.control.gpu_demands import (
    Claim,
    Need,
    Needs,
    claim_of,
    claims,
    demand_of,
    devices,
    seat_on,
    wants_gpu,
)
from serving.control.gpus import Standing
from serving.control.leases import Applicant, Lease, LeaseBook
from serving.control.placement_view import claim_row, gpu_row, sentence
from serving.control.reconcile import Clock
from serving.control.records import Record
from serving.control.state import State
from serving.core.memory_profile import MemoryProfile
from serving.core.placement import Demand, Device, Placement
from serving.core.plan import AppSpec
from serving.core.replica import GpuLease
from serving.core.seats import Seat
from serving.errors import ConflictError, Unavailable
from serving.store.memory_profiles import ProfileRow

UNHEARD_PATIENCE_S: Final = 15.0
"""How long applications wait for the first report of GPUs that Ray counts."""

_HINT: Final = (
    "nothing was changed; stop something, lower replicas or batching.max_size, or set device: cpu"
)

_log = logging.getLogger(__name__)


class Placer:
    """Lives on the controller's loop.

    `standings` gives the GPUs as they are now, `unheard` the nodes whose GPUs are not known yet.
    """

    def __init__(
        self,
        standings: Callable[[], Sequence[Standing]],
        unheard: Callable[[], Sequence[str]],
        needs: Needs,
        clock: Clock,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.book = LeaseBook()
        self._standings, self._unheard = standings, unheard
        self._needs, self._clock, self._new_id = needs, clock, new_id
        self._unsaved: set[str] = set()
        self._unheard_since: float | None = None
        # Replicas that applications are to have beside those asked for, while some move.
        self.extra: Mapping[str, int] = {}
        # Why replicas of an application stay on a cordoned GPU.
        self.stays: Mapping[str, str] = {}

    def devices(self) -> list[Device]:
        """What replicas can be placed on."""
        return devices(self._standings(), self.book.leases)

    def _vacated(self) -> list[Device]:
        """The same, without what has given its share back and may not have ended yet."""
        return devices(self._standings(), [*self.book.leases, *self.book.released])

    # Where something starts.

    def seating(
        self,
        apps: Sequence[AppSpec],
        state: State,
        records: Sequence[Record],
        ray_gpus: Mapping[str, float],
        next_number: Callable[[str], int] = lambda _: 0,
    ) -> dict[str, tuple[Seat, ...] | None]:
        """Which of `apps` may start now, by name, with the seats of those that go to GPUs.

        Who wants a GPU waits a little for those that were never heard of. `ray_gpus` is what Ray
        counts, by node; `next_number` gives the lowest number for new seats of an application.
        """
        found = self.devices()
        there_are_any = bool(found or ray_gpus)
        wanting = [a for a in apps if wants_gpu(a.replica, there_are_any=there_are_any)]
        if not there_are_any:
            wanting = []
        if wanting and self._waits_for_gpus():
            return {a.name: None for a in apps if a not in wanting}
        seats: dict[str, tuple[Seat, ...] | None] = dict.fromkeys(a.name for a in apps)
        for app in wanting:
            first = next_number(app.name)
            numbers = range(first, first + app.count)
            seats[app.name] = self.new_seats(app, numbers, state, records, ray_gpus)
        return seats

    def new_seats(
        self,
        app: AppSpec,
        numbers: Sequence[int],
        state: State,
        records: Sequence[Record],
        ray_gpus: Mapping[str, float],
    ) -> tuple[Seat, ...]:
        """Seats with these numbers, on the nodes that are planned for what `app` has too few.

        Where there is no room yet, it is planned as if those that leave had gone: their replicas
        wait for it.
        """
        found, waves = self.devices(), claims(state, records)
        need = self._needs_of(waves, found).get(app.name)
        planned = self._planned(app, found, waves)
        if len(planned) < len(numbers):
            planned = self._planned(app, self._vacated(), waves, vacated=True)
        # The last ones: who is starting has yet to take the first.
        planned = planned[-len(numbers) :]
        on_node = Counter(d.node for d in found)
        return tuple(
            seat_on(device, number, need, ray_gpus.get(device.node), on_node[device.node])
            if device is not None and need is not None
            else Seat(number)
            for number, device in zip_longest(numbers, planned)
        )

    def wanted_nodes(self, app: AppSpec, state: State, records: Sequence[Record]) -> frozenset[str]:
        """The nodes that are planned for the replicas that have no lease yet."""
        planned = self._planned(app, self.devices(), claims(state, records))
        return frozenset(device.node for device in planned)

    def _planned(
        self,
        app: AppSpec,
        found: Sequence[Device],
        waves: Sequence[Sequence[Claim]],
        *,
        vacated: bool = False,
    ) -> list[Device]:
        demands = self._demands(waves, self._needs_of(waves, found))
        placed = self.book.plan(found, demands, vacated=vacated)
        held = len(self.book.staying(app.name))
        by_uuid = {d.uuid: d for d in found}
        return [by_uuid[uuid] for uuid in placed.slots.get(app.name, ())[held:]]

    def room(
        self, app: AppSpec, have: int, more: int, state: State, records: Sequence[Record]
    ) -> tuple[int, str]:
        """How many of `more` replicas fit beside the `have` extra ones; why not all, or ""."""
        found, waves = self.devices(), claims(state, records)
        needs, refused = self._needs_of(waves, found), ""
        if app.name not in needs:
            return 0, "it runs on no GPU that is known"
        for fits in range(more, 0, -1):
            demands = self._demands(waves, needs, {**self.extra, app.name: have + fits})
            placed = self.book.plan(found, demands)
            if app.name not in placed.refused:
                return fits, refused
            refused = placed.refused[app.name]
        return 0, refused

    def _waits_for_gpus(self) -> bool:
        if not self._unheard():
            self._unheard_since = None
            return False
        now = self._clock.monotonic()
        if self._unheard_since is None:
            self._unheard_since = now
        return now - self._unheard_since < UNHEARD_PATIENCE_S

    # Before something starts.

    def check(self, plan: Mapping[str, Any]) -> None:
        """Raise `ConflictError` where what is new in a `preview` finds no room."""
        refused = [row for row in plan["models"] if row["new"] and row["refused"]]
        if refused:
            raise ConflictError(f"{'; '.join(sentence(row) for row in refused)}; {_HINT}")

    def preview(
        self,
        state: State,
        records: Sequence[Record],
        new: Sequence[AppSpec] = (),
        *,
        rolling_out: Collection[str] = (),
        leaving: Collection[str] = (),
    ) -> dict[str, Any]:
        """Where everything goes, and what is in the way: {"gpus": […], "models": […]}.

        `new` applications choose after all that have a claim already; those of them that run may
        ask for more replicas. Models in `rolling_out` will have two arms that keep apart; those in
        `leaving` give up what they hold.
        """
        waves = claims(state, records)
        gone = {c.app.name for wave in waves for c in wave if c.app.replica.model in leaving}
        arms = {*rolling_out, *(r.rollout.model for r in records if r.live and not r.released)}
        known = {c.app.name: c.replicas for wave in waves for c in wave if c.app.name not in gone}
        asked = {a.name: state.asked(a) for a in new}
        grown = {n: count for n, count in asked.items() if n in known and count != known[n]}
        waves = [
            [
                claim_of(c.app, grown.get(c.app.name, c.replicas), arms)
                for c in wave
                if c.app.name not in gone
            ]
            for wave in waves
        ]
        added = [claim_of(a, asked[a.name], arms) for a in new if a.name not in known]
        more = {n for n, count in grown.items() if count > known[n]}
        return self._view([*waves, added], {c.app.name for c in added} | more, gone)

    def no_room(self, state: State, records: Sequence[Record], app: str) -> str | None:
        """Why not all replicas that `state` wants of an application find a GPU; None: they do."""
        found = self.devices()
        if not found:
            return None
        waves = claims(state, records)
        demands = self._demands(waves, self._needs_of(waves, found))
        return self.book.plan(found, demands).refused.get(app)

    def _view(
        self, waves: list[list[Claim]], new: Collection[str], gone: Collection[str]
    ) -> dict[str, Any]:
        found = self.devices()
        needs = self._needs_of(waves, found)
        demands = self._demands(waves, needs)
        placed = self.book.plan(found, demands, without=gone)
        if not found:
            placed = Placement(placed.slots)
        planned = {
            app: (needs[app].bytes, slots[len(self.book.staying(app)) :])
            for app, slots in placed.slots.items()
        }
        return {
            "gpus": [gpu_row(d, self._held_on(d, gone), planned.values()) for d in found],
            "models": [
                self._row(c, needs.get(c.app.name), placed, c.app.name in new)
                for wave in waves
                for c in wave
            ],
        }

    def _held_on(self, device: Device, gone: Collection[str]) -> int:
        return sum(x.terms.bytes for x in self.book.on(device.uuid) if x.app not in gone)

    def _row(self, claim: Claim, need: Need | None, placed: Placement, new: bool) -> dict[str, Any]:
        name = claim.app.name
        return {
            **claim_row(claim, need, placed, [x.replica for x in self.book.staying(name)]),
            "new": new,
            "ceilings": self._needs.ceilings(claim.app.replica.digest),
            "stays": self.stays.get(name),
        }

    # What replicas ask for.

    def lease(
        self,
        app: str,
        replica: str,
        node: str,
        pid: int,
        state: State,
        records: Sequence[Record],
    ) -> GpuLease | None:
        """A share of a GPU for a replica, or the one it has; None where it is to run on the CPU.

        To be asked for again every two seconds while it loads; its announcements renew it from then
        on. Raises `DeviceError` with the numbers where there is no room, and `Unavailable` where it
        is too early to tell.
        """
        found, waves = self.devices(), claims(state, records)
        spec = next((c.app for wave in waves for c in wave if c.app.name == app), None)
        if spec is None:
            raise Unavailable(f"{app} is not to run")
        if not found and (nodes := self._unheard()) and wants_gpu(spec.replica, there_are_any=True):
            raise Unavailable(f"the GPUs of {', '.join(nodes)} are not known yet")
        if not found or not wants_gpu(spec.replica, there_are_any=True):
            return None
        needs = self._needs_of(waves, found)
        lease = self.book.lease(
            Applicant(app, replica, node, pid, self._new_id()),
            found,
            self._demands(waves, needs),
            estimated=needs[app].estimated,
            now=self._clock.monotonic(),
            unix=self._clock.unix(),
            ceiling=partial(self._needs.ceiling, spec.replica.digest),
            later=self._vacated(),
        )
        return lease.terms

    def heard(self, info: Mapping[str, Any]) -> None:
        """A replica's announcement: what it holds, and what its version was measured to take."""
        replica = str(info["replica"])
        if info["state"] == "failed":
            self.book.release(replica)
        elif not self.book.renew(replica, self._clock.monotonic()) and info.get("lease_bytes"):
            self.book.restore(self._held(info, replica))
        if profile := info.get("profile"):
            self._learn(info, profile)

    def _learn(self, info: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
        digest, profile = str(info["digest"]), MemoryProfile.from_dict(raw)
        within = int(info.get("lease_bytes") or 0)
        if self._needs.learn(digest, profile, info.get("ceiling"), within):
            self._unsaved.add(digest)

    def _held(self, info: Mapping[str, Any], replica: str) -> Lease:
        now, gpu, size = self._clock.monotonic(), str(info["gpu"]), int(info["lease_bytes"])
        total = next((d.memory_bytes for d in self.devices() if d.uuid == gpu), size)
        terms = GpuLease(self._new_id(), gpu, size, total)
        app, node, pid = str(info["app"]), str(info["node"]), int(info["pid"])
        # Whether it was an estimate was not said; `tick` takes it for one.
        return Lease(terms, app, replica, node, pid, True, self._clock.unix(), now)

    def recall(self, rows: Iterable[ProfileRow]) -> None:
        """Take up what was learned before."""
        for row in rows:
            profile = MemoryProfile.from_dict(row.profile)
            self._needs.learn(row.digest, profile, row.ceiling, row.lease_bytes)

    def unsaved(self) -> list[ProfileRow]:
        """What was learned since it was last `saved`."""
        return [row for digest in sorted(self._unsaved) for row in self._needs.rows(digest)]

    def saved(self, rows: Sequence[ProfileRow]) -> None:
        """The store has these now."""
        self._unsaved -= {row.digest for row in rows if row in self._needs.rows(row.digest)}

    def tick(self, state: State, records: Sequence[Record]) -> None:
        """Free what vanished replicas held, and what was reserved by an estimate too high."""
        for lease in self.book.expire(self._clock.monotonic()):
            _log.info("%s has vanished: its share of %s is free", lease.replica, lease.terms.uuid)
        if any(lease.estimated for lease in self.book.leases):
            for app, need in self._needs_of(claims(state, records), self.devices()).items():
                if not need.estimated:
                    self.book.measured(app, need.bytes)

    def _demands(
        self,
        waves: Sequence[Sequence[Claim]],
        needs: Mapping[str, Need],
        extra: Mapping[str, int] | None = None,
    ) -> list[list[Demand]]:
        more = self.extra if extra is None else extra
        return [
            [
                demand_of(c, needs[c.app.name], more.get(c.app.name, 0))
                for c in wave
                if c.app.name in needs
            ]
            for wave in waves
        ]

    def _needs_of(
        self, waves: Sequence[Sequence[Claim]], found: Sequence[Device]
    ) -> dict[str, Need]:
        types = {d.type for d in found}
        return {
            c.app.name: self._needs.of(c.app.replica, types)
            for wave in waves
            for c in wave
            if wants_gpu(c.app.replica, there_are_any=bool(found))
        }
