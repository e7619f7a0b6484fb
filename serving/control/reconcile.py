"""One tick: look at the world, decide, take the step.

It is safe to repeat, and to lose between any two effects.

State is saved before the effect that it announces, and every effect is idempotent: after a crash
the next tick sees what was done and does the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeVar

from serving.control.board import RouteBoard
from serving.control.fleet import Fleet
from serving.control.state import AppStatus, Cluster, State
from serving.control.totals import Totals
from serving.control.turn import Turn
from serving.core.plan import (
    AppSpec,
    Decision,
    ObservedApp,
    Phase,
    decide,
    is_drained,
    route_table,
)
from serving.core.routing import Arm, Endpoint, RouteTable
from serving.core.seats import Seat
from serving.store.audit import AuditEntry
from serving.store.pins import PinRow
from serving.store.rollouts import RolloutRow
from serving.store.sql import Store

log = logging.getLogger(__name__)

T = TypeVar("T")
Overlay = Callable[[RouteTable], RouteTable]
Seating = Callable[[Sequence[AppSpec]], Mapping[str, Sequence[Seat] | None]]
Outcome = Literal["converging", "converged", "failed"]

REANNOUNCE_WAIT_S: Final = 6.0
"""Three announcement periods: whoever listens again has heard all replicas after it."""
_LATE_TICKS: Final = 5


class Blocking(Protocol):
    """Runs a blocking call off the loop."""

    def __call__(self, call: Callable[..., T], *args: Any) -> Awaitable[T]:
        """`call(*args)` in a thread."""


@dataclass
class Clock:
    """Monotonic time for durations, Unix time for records."""

    monotonic: Callable[[], float]
    unix: Callable[[], float]


@dataclass
class _Retiring:
    """An application that left the routes: since which revision, since when, and whose it was."""

    revision: int
    since: float
    model: str
    version: str | None


class Reconciler:
    """Moves what runs towards the state's `desired`. Lives on the controller's loop.

    Whoever changes the state holds `lock`. `overlay` adds to a route table what rollouts want of
    it; `recall_rollouts` reads them from the store again. `endpoints` are the ready replicas by
    application at the last `look`: whatever is decided until the next one goes by them.
    """

    def __init__(
        self,
        state: State,
        board: RouteBoard,
        fleet: Fleet,
        totals: Totals,
        *,
        store: Store,
        in_store: Blocking,
        cluster: Cluster,
        in_cluster: Blocking,
        clock: Clock,
        tick_s: float,
        drain_s: float,
    ) -> None:
        self.state = state
        self.board = board
        self.fleet = fleet
        self.totals = totals
        self.apps: Mapping[str, AppStatus] = {}
        self.settled = False
        self.lock = Turn(self._recall)
        self.overlay: Overlay = lambda table: table
        # Who may start now, with the seats of those that have some.
        self.seating: Seating = lambda apps: dict.fromkeys(app.name for app in apps)
        # Seats that are leaving: nobody is sent there any more.
        self.leaving: Collection[str] = ()
        self.recall_rollouts: Callable[[], Awaitable[None]] = _nothing
        # What a replica costs, in USD an hour.
        self.price: Callable[[str], float | None] = lambda _: None
        self.endpoints: Mapping[str, tuple[Endpoint, ...]] = _published(state, board.table)
        self._store, self._in_store = store, in_store
        self._cluster, self._in_cluster = cluster, in_cluster
        self._clock = clock
        self._tick_s = tick_s
        self._drain_s = drain_s
        self._specs: dict[str, AppSpec] = {}
        self._retiring: dict[str, _Retiring] = {}
        # Who starts is not given up before its replicas can have been heard.
        self._looked_at = self._looking_since = clock.unix()
        # How many replicas Serve was told to run, by this process.
        self._told: dict[str, int] = {}

    def adopt(self, state: State) -> None:
        """Go by a state that has been saved."""
        self.state = state
        self.settled = False

    @property
    def outcome(self) -> Outcome:
        """How far the last apply has come."""
        if not self.settled:
            return "converging"
        failed = self.state.desired.apps().keys() & self.state.given_up.keys()
        return "failed" if failed else "converged"

    def look(self) -> None:
        """See who is there now. Needs no Serve, so that a stuck one stops no replacement."""
        unix = self._clock.unix()
        if not 0 <= unix - self._looked_at <= max(REANNOUNCE_WAIT_S, _LATE_TICKS * self._tick_s):
            self._looking_since = unix
        self._looked_at = unix
        current = self.state.desired.apps() | self.state.routed.apps()
        self._specs = {n: a for n, a in self._specs.items() if n in self.apps} | current
        wanted = {name: self._expected(app) for name, app in self._specs.items()}
        self.fleet.expire(self._clock.monotonic(), wanted)
        names = {*self.apps, *current}
        self.endpoints = {name: self.fleet.endpoints(name, self.leaving) for name in names}

    def _expected(self, app: AppSpec) -> int:
        """How many replicas may be ready: more than are wanted while some move."""
        status = self.apps.get(app.name)
        return max(self.state.wanted(app), len(status.seats) if status is not None else 0)

    async def publish(self) -> None:
        """Publish who is there. The caller holds `lock`. Raises `StoreError`."""
        await self.commit(self.state)

    async def commit(
        self,
        state: State,
        *,
        overlay: Overlay | None = None,
        rollouts: Sequence[RolloutRow] = (),
        audit: Sequence[AuditEntry] = (),
        pins: Sequence[PinRow] | None = None,
        event: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        """Save what changed in one transaction; then go by `state`, and publish its routes.

        `overlay` is the one that goes with `rollouts`. The caller holds `lock`. Raises `StoreError`
        or `ConflictError`: whoever has the lock next goes by what the store has then.
        """
        table = self._table(state, overlay or self.overlay)
        rerouted = self.board.differs(table)
        if rerouted:
            revision = await self._in_store(self._store.next_revision)
            table = replace(table, revision=revision)
        changed = state != self.state
        if not (rerouted or changed or rollouts or audit or pins is not None or event):
            return
        write = partial(
            self._store.commit,
            desired=state.to_dict() if changed else None,
            rollouts=rollouts,
            route_table=table.to_dict() if rerouted else None,
            audit=audit,
            pins=pins,
            event=event,
        )
        try:
            await self._in_store(write)
        except BaseException:
            self.lock.doubt()
            raise
        if changed:
            self.adopt(state)
        if rerouted:
            self.board.publish(table)

    async def _recall(self) -> None:
        """Go by what the store has. Raises `StoreError`."""
        state = await self._in_store(self._store.desired)
        table = await self._in_store(self._store.route_table)
        if state is not None:
            self.adopt(State.from_dict(state))
        if table is not None and table["revision"] > self.board.revision:
            self.board.publish(RouteTable.from_dict(table))
        await self.recall_rollouts()

    def _table(self, state: State, overlay: Overlay) -> RouteTable:
        endpoints = {name: self.endpoints.get(name, ()) for name in state.routed.apps()}
        table = route_table(state.routed, endpoints, self.board.revision)
        # What an earlier deployment has routed says nothing of this one.
        same = state.deployment == self.state.deployment
        complete = (same and self.board.table.complete) or _all_routed(state)
        return self._priced(overlay(replace(table, complete=complete)))

    def _priced(self, table: RouteTable) -> RouteTable:
        """The table with the price of every replica that is in it."""

        def priced(arm: Arm) -> Arm:
            found = {e.replica: self.price(e.replica) for e in arm.endpoints}
            prices = {replica: usd for replica, usd in found.items() if usd is not None}
            return replace(arm, prices=prices)

        models = {
            name: replace(route, arms={v: priced(arm) for v, arm in route.arms.items()})
            for name, route in table.models.items()
        }
        return replace(table, models=models)

    async def tick(self, *, gateways_known: bool = True) -> None:
        """One step. Without `gateways_known`, who may still need it being unknown, none is retired.

        What Serve is asked to do, which may take it seconds, is outside of the lock: no rollout
        waits for it. Raises `StoreError` or `ClusterError`; the next tick does what was not done.
        """
        self.apps = await self._in_cluster(self._cluster.observe)
        async with self.lock:
            now = self._clock.monotonic()
            decision = decide(
                self.state.desired, self.state.routed, self._observed(), self.state.given_up
            )
            await self._record(decision)
            await self.publish()
            drained = self._drained(decision, now) if gateways_known else []
            self.settled = not (decision.pending or decision.start or decision.retire)
            start = [replace(app, count=max(1, self.state.wanted(app))) for app in decision.start]
        await self._start(start)
        await self._delete(drained)
        await self._scale()

    def _observed(self) -> dict[str, ObservedApp]:
        unix = self._clock.unix()
        names = {*self.apps, *self.state.desired.apps(), *self.state.routed.apps()}
        seen = {}
        for name in names:
            spec = self._specs.get(name)
            wanted = None if spec is None else self.state.wanted(spec)
            # Without replicas one that runs on GPUs is nothing to Serve.
            absent = Phase.RUNNING if wanted == 0 else Phase.ABSENT
            status = self.apps.get(name, AppStatus(absent, "", 0.0))
            error = self.fleet.error(name)
            if status.phase is Phase.FAILED:
                error = error or status.message
            # What was there before the last apply may be starting replicas for it.
            age = max(0.0, unix - max(status.since, self.state.applied_at))
            if unix - self._looking_since < REANNOUNCE_WAIT_S:
                age = 0.0
            endpoints = self.endpoints.get(name, ())
            seen[name] = ObservedApp(status.phase, endpoints, error, age, wanted)
        return seen

    async def _record(self, decision: Decision) -> None:
        before = self.state
        if (decision.routed, decision.given_up) == (before.routed, before.given_up):
            return
        after = replace(before, routed=decision.routed, given_up=dict(decision.given_up))
        event = None
        if decision.routed != before.routed:
            routed = {n: {"version": m.version, "apps": [s.app.name for s in m.versions.values()]}
                      for n, m in decision.routed.models.items()}  # fmt: skip
            log.info("routes: %s", routed)
            event = ("routed", {"models": routed})
        await self.commit(after, event=event)
        await self._tell_given_up(before)

    async def _start(self, starting: Sequence[AppSpec]) -> None:
        seats = self.seating(starting)
        apps = [app for app in starting if app.name in seats]
        if apps:
            names = [app.name for app in apps]
            log.info("starting %s", ", ".join(names))
            await self._event("start", apps=names)
            own = {name: of for name, of in seats.items() if of is not None}
            self._forget_told(names)
            await self._give_up(await self._in_cluster(self._cluster.start, apps, own))
            self._told |= {app.name: app.count for app in apps}

    async def _scale(self) -> None:
        """Tell Serve how many replicas its applications are to have, where that has changed.

        Serve keeps what it is told; after a restart of this process it is told once more.
        """
        there = (Phase.STARTING, Phase.RUNNING)
        # Seats come and go by moves.
        running = {n for n, app in self.apps.items() if app.phase in there and not app.seats}
        apps, routed = self.state.desired.apps(), self.state.routed.apps()
        apps = routed | {n: a for n, a in apps.items() if n not in self.state.given_up}
        self._told = {name: n for name, n in self._told.items() if name in apps}
        wanted = {name: self.state.wanted(app) for name, app in apps.items() if name in running}
        changed = {name: n for name, n in wanted.items() if self._told.get(name) != n}
        if changed:
            self._forget_told(changed)
            await self._in_cluster(self._cluster.scale, changed)
            self._told |= changed

    def _forget_told(self, names: Iterable[str]) -> None:
        """They are about to be told: what fails without an answer may have been heard."""
        self._told = {name: n for name, n in self._told.items() if name not in set(names)}

    async def _give_up(self, refused: Mapping[str, str]) -> None:
        """Do not try again what can never start."""
        if not refused:
            return
        async with self.lock:
            before = self.state
            await self.commit(replace(before, given_up={**before.given_up, **refused}))
            await self._tell_given_up(before)

    async def _tell_given_up(self, before: State) -> None:
        after = self.state.given_up
        for name in after.keys() - before.given_up.keys():
            log.error("%s is given up: %s", name, after[name])
            await self._event("given_up", app=name, error=after[name])

    def _drained(self, decision: Decision, now: float) -> list[str]:
        """Of the applications to retire, those that nobody needs any more."""
        for name in self._retiring.keys() - set(decision.retire):
            del self._retiring[name]
        done = []
        for name in decision.retire:
            leaving = self._retiring.setdefault(name, self._leave(name, now))
            views = self.totals.views(now, self._tick_s)
            # Where no gateway is known, nobody has said that it is done.
            drained = views and is_drained(leaving.model, leaving.version, leaving.revision, views)
            if drained or now - leaving.since > self._drain_s:
                done.append(name)
        return done

    async def _delete(self, done: Sequence[str]) -> None:
        if done:
            log.info("deleting %s", ", ".join(done))
            await self._event("delete", apps=list(done))
            await self._in_cluster(self._cluster.delete, done)

    def _leave(self, name: str, now: float) -> _Retiring:
        spec = self._specs.get(name)
        if spec is None:  # from before this controller's life
            return _Retiring(self.board.revision, now, "", None)
        model, version = spec.replica.model, spec.replica.version
        still = self.state.routed.models.get(model)
        shared = still is not None and version in still.versions
        return _Retiring(self.board.revision, now, model, None if shared else version)

    async def _event(self, kind: str, **body: Any) -> None:
        await self._in_store(self._store.append_event, kind, body)


async def _nothing() -> None:
    """Without rollouts there are none to read."""


def _published(state: State, table: RouteTable) -> dict[str, tuple[Endpoint, ...]]:
    """The ready replicas as the table of an earlier controller has them, until the first look."""
    return {
        served.app.name: table.models[name].arms[version].endpoints
        for name, model in state.routed.models.items()
        for version, served in model.versions.items()
        if name in table.models and version in table.models[name].arms
    }


def _all_routed(state: State) -> bool:
    """Whether something was applied, and every version of it is routed."""
    return bool(state.config) and state.desired.apps().keys() <= state.routed.apps().keys()
