"""Moves replicas off cordoned GPUs: another one first, then the routes, then the old one goes.

Where the number of replicas follows the load, it adds and ends them likewise.

One that cannot start because its node has no room is moved to a node that has.

What is to be done is `decide_moves`' decision, made anew from what runs whenever Serve was looked
at. Nothing of it is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from serving.control.gpu_demands import claims
from serving.control.gpus import Gpus
from serving.control.placer import Placer
from serving.control.reconcile import Blocking, Clock, Reconciler
from serving.control.records import Record
from serving.control.state import Cluster
from serving.core.plan import AppSpec, Phase, is_drained
from serving.core.seats import Moves, Seat, Stage, Taken, decide_moves, next_number, seat_name
from serving.store.sql import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A seat that left the routes: whose it is, since which revision, since when."""

    app: str
    revision: int
    since: float


class Mover:
    """Lives on the controller's loop."""

    def __init__(
        self,
        reconciler: Reconciler,
        placer: Placer,
        gpus: Gpus,
        records: Callable[[], Sequence[Record]],
        *,
        store: Store,
        in_store: Blocking,
        cluster: Cluster,
        in_cluster: Blocking,
        clock: Clock,
        tick_s: float,
        drain_s: float,
    ) -> None:
        self._reconciler, self._placer, self._gpus = reconciler, placer, gpus
        self._records = records
        self._store, self._in_store = store, in_store
        self._cluster, self._in_cluster = cluster, in_cluster
        self._clock, self._tick_s, self._drain_s = clock, tick_s, drain_s
        self._leaving: dict[str, _Leaving] = {}
        self._known: frozenset[str] = frozenset()

    @property
    def due(self) -> bool:
        """Whether something moves or may have to, so that the next step should not be late."""
        there = self._reconciler.apps
        return (
            bool(self._leaving or self._placer.extra)
            or self._cordons() != self._known
            or any(len(there[n].seats) != app.count for n, app in self._seated().items())
        )

    def next_number(self, app: str) -> int:
        """The number of the next seat of an application.

        It is higher than that of any seat that runs or leaves, or has a replica that was heard of:
        the new one would be taken for it.
        """
        status = self._reconciler.apps.get(app)
        heard = (r.seat for r in self._reconciler.fleet.of(app))
        return next_number(app, {*(status.seats if status else ()), *self._leaving, *heard})

    async def step(self) -> None:
        """One step; Serve was looked at just now. Raises `StoreError` or `ClusterError`."""
        reconciler = self._reconciler
        async with reconciler.lock:
            apps = self._seated()
            self._forget()
            moves = self._decide(apps)
            if new := {s: name for name, m in moves.items() for s in m.leave}:
                reconciler.leaving = {*self._leaving, *new}
                reconciler.look()
                await reconciler.publish()
                since = reconciler.board.revision, self._clock.monotonic()
                self._leaving |= {seat: _Leaving(app, *since) for seat, app in new.items()}
        await self._end(self._drained())
        for name, move in moves.items():
            if move.add:
                await self._add(apps[name], move.add)

    def _cordons(self) -> frozenset[str]:
        return frozenset(d.uuid for d in self._placer.devices() if d.cordoned)

    def _seated(self) -> dict[str, AppSpec]:
        """The applications with seats that are to run, with as many replicas as are wanted."""
        there, state = self._reconciler.apps, self._reconciler.state
        claimed = [c for wave in claims(state, self._records()) for c in wave]
        return {
            c.app.name: replace(c.app, count=state.wanted(c.app))
            for c in claimed
            if c.app.name in there and there[c.app.name].seats
        }

    def _forget(self) -> None:
        """Let go of seats that are gone, with their replicas."""
        there = {s for status in self._reconciler.apps.values() for s in status.seats}
        ready = {r.seat for r in self._reconciler.fleet.replicas() if r.state == "ready"}
        self._leaving = {s: x for s, x in self._leaving.items() if s in there | ready}
        self._reconciler.leaving = set(self._leaving)

    def _decide(self, apps: Mapping[str, AppSpec]) -> dict[str, Moves]:
        cordoned = self._known = self._cordons()
        self._placer.extra, self._placer.stays = {}, {}
        moves = {}
        for name, app in apps.items():
            if not self._all_known(app):
                continue
            stranded = self._stranded(app)
            seats = self._taken(name, cordoned, stranded)
            staying = sum(s.stage is not Stage.LEAVING for s in seats)
            coming = max(0, staying - app.count)
            found = decide_moves(app.count, seats, partial(self._room, app, coming))
            if coming or found.add:
                extra = max(0, staying + found.add - app.count)
                self._placer.extra = {**self._placer.extra, name: extra}
            moves[name] = replace(found, leave=(*found.leave, *stranded))
        return moves

    def _all_known(self, app: AppSpec) -> bool:
        """Whether the GPUs of all its replicas have been reported: else who is to move is open."""
        known = {None, *(d.uuid for d in self._placer.devices())}
        return all(r.info.get("gpu") in known for r in self._reconciler.fleet.of(app.name))

    def _stranded(self, app: AppSpec) -> list[str]:
        """Seats that Serve gives up, or on nodes that have no room while another node has."""
        dead = self._given_up(app)
        replicas = [r for r in self._reconciler.fleet.of(app.name) if r.seat not in self._leaving]
        there = self._reconciler.apps[app.name].seats.keys() - {
            r.seat for r in replicas if r.state != "failed"
        }
        failed = {r.seat: r.endpoint.node for r in replicas if r.seat in there}
        if not failed:
            return dead
        nodes = self._placer.wanted_nodes(app, self._reconciler.state, self._records())
        roomless = [s for s, node in sorted(failed.items()) if nodes and node not in nodes]
        return [*dead, *(seat for seat in roomless if seat not in dead)]

    def _given_up(self, app: AppSpec) -> list[str]:
        """Seats that Serve does not try to start any more: another one may be luckier."""
        ready = {r.seat for r in self._reconciler.fleet.of(app.name) if r.state == "ready"}
        return [
            seat
            for seat, phase in sorted(self._reconciler.apps[app.name].seats.items())
            if phase is Phase.FAILED and seat not in ready and seat not in self._leaving
        ]

    def _room(self, app: AppSpec, coming: int, wanted: int) -> int:
        state = self._reconciler.state
        fits, why = self._placer.room(app, coming, wanted, state, self._records())
        if fits < wanted:
            self._placer.stays = {**self._placer.stays, app.name: why}
        return fits

    def _taken(self, app: str, cordoned: Collection[str], stranded: Collection[str]) -> list[Taken]:
        ready = {}
        for replica in sorted(self._reconciler.fleet.of(app), key=lambda r: r.heard_at):
            if replica.state == "ready":
                ready[replica.seat] = str(replica.info.get("gpu"))
        found = []
        for seat, phase in self._reconciler.apps[app].seats.items():
            if phase is Phase.DELETING or seat in self._leaving or seat in stranded:
                found.append(Taken(seat, Stage.LEAVING))
            elif seat in ready:
                found.append(Taken(seat, Stage.READY, ready[seat] in cordoned))
            else:
                found.append(Taken(seat, Stage.STARTING))
        return found

    def _drained(self) -> list[str]:
        """Of the seats that leave, those that no gateway sends to any more."""
        now = self._clock.monotonic()
        views = self._reconciler.totals.views(now, self._tick_s)
        seats = {s: p for a in self._reconciler.apps.values() for s, p in a.seats.items()}
        return [
            seat
            for seat, leaving in self._leaving.items()
            if seats.get(seat, Phase.DELETING) is not Phase.DELETING
            and (
                (views and is_drained("", None, leaving.revision, views))
                or now - leaving.since > self._drain_s
            )
        ]

    async def _end(self, seats: Sequence[str]) -> None:
        if seats:
            log.info("deleting %s: replaced", ", ".join(seats))
            await self._event("delete", apps=list(seats))
            await self._in_cluster(self._cluster.delete, seats)

    async def _add(self, app: AppSpec, count: int) -> None:
        first = self.next_number(app.name)
        seats: tuple[Seat, ...] = self._placer.new_seats(
            app,
            range(first, first + count),
            self._reconciler.state,
            self._records(),
            self._gpus.counted_by_ray,
        )
        names = [seat_name(app.name, s.number) for s in seats]
        log.info("starting %s elsewhere", ", ".join(names))
        await self._event("start", apps=names)
        await self._in_cluster(self._cluster.start, [app], {app.name: seats})

    async def _event(self, kind: str, **body: Any) -> None:
        await self._in_store(self._store.append_event, kind, body)
