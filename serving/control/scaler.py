"""How many replicas applications have whose number follows their load: observe, decide, commit.

Lives on the controller's loop. What is decided is part of the state; `Reconciler` tells Serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from serving.control.fleet import Fleet
from serving.control.load import Load
from serving.control.reconcile import Clock, Reconciler
from serving.control.records import Record
from serving.control.state import State
from serving.control.totals import ArmTotals, Totals
from serving.core.plan import AppSpec, ServedVersion
from serving.core.rollout import CONTROLLER
from serving.core.scaling import Decision, Memory, Observation, Scaling, begin, decide
from serving.store.audit import AuditEntry

log = logging.getLogger(__name__)

ACTION: Final = "scale"
_EARLY_S: Final = 0.05

NoRoom = Callable[[State, Sequence[Record], str], str | None]
"""Why not all replicas that a state wants of an application find a GPU; None where they do."""


@dataclass
class Tracked:
    """One application that is scaled: its load, the last observation and what was made of it."""

    memory: Memory
    load: Load = field(default_factory=Load)
    seen: Observation | None = None
    reason: str = ""


class Scaler:
    """Whoever calls `tick` holds the reconciler's lock."""

    def __init__(
        self,
        reconciler: Reconciler,
        fleet: Fleet,
        totals: Totals,
        no_room: NoRoom,
        *,
        clock: Clock,
        tick_s: float,
    ) -> None:
        self._reconciler = reconciler
        self._fleet, self._totals, self._no_room = fleet, totals, no_room
        self._clock, self._tick_s = clock, tick_s
        self._tracked: dict[str, Tracked] = {}
        self._ticked = -tick_s

    def tracked(self, app: str) -> Tracked | None:
        """What was seen of an application that is scaled."""
        return self._tracked.get(app)

    def is_woken(self, report: Mapping[str, Any]) -> bool:
        """Whether a gateway's report has requests that wait for a version that is asleep."""
        waiting = {(m["model"], m["version"]) for m in report["models"] if m.get("waiting")}
        state = self._reconciler.state
        return any(
            (name, version) in waiting and state.wanted(served.app) == 0
            for name, model in state.routed.models.items()
            for version, served in model.versions.items()
        )

    async def tick(self, records: Sequence[Record], *, at_once: bool) -> None:
        """Decide about every application that is scaled, and commit what changes.

        Not earlier than a tick after the last time, but for `at_once`. Raises `StoreError`.
        """
        now, state = self._clock.monotonic(), self._reconciler.state
        apps = {
            name: state.as_asked(app)
            for name, app in (state.desired.apps() | state.routed.apps()).items()
        }
        scaled = {n: a for n, a in apps.items() if a.scaling is not None}
        self._tracked = {n: t for n, t in self._tracked.items() if n in scaled}
        early = now - self._ticked < self._tick_s - _EARLY_S and not at_once
        if (not scaled and not state.scaled) or (early and scaled.keys() <= state.scaled.keys()):
            return
        self._ticked = now
        arms = self._totals.sum(self._totals.live(now, self._tick_s))
        routed = _by_app(state)
        wanted: dict[str, int] = {}
        audit = []
        for name, app in scaled.items():
            floor = _floor(state, records, app)
            before = state.wanted(app)
            if name in routed:
                key = (app.replica.model, app.replica.version)
                totals = arms.get(key, ArmTotals())
                served = replace(routed[name], app=app)
                decision = self._decided(served, before, totals, floor, now)
                decision = self._placed(decision, app, before, state, records)
                after, reason = decision.wanted, decision.reason
            else:
                after, reason = max(before, min(floor, _scaling(app).most)), "for the rollout"
            wanted[name] = after
            if after != before:
                log.info("%s: %d replicas instead of %d: %s", name, after, before, reason)
                audit.append(_entry(self._clock.unix(), app, before, after, reason))
        # Of one that is about to have a fixed number, should that fail.
        kept = {n for n, s in routed.items() if s.app.scaling is not None and n not in wanted}
        wanted |= {name: state.scaled[name] for name in kept & state.scaled.keys()}
        if wanted != state.scaled:
            await self._reconciler.commit(replace(state, scaled=wanted), audit=audit)

    def _decided(
        self, served: ServedVersion, wanted: int, totals: ArmTotals, floor: int, now: float
    ) -> Decision:
        name, scaling = served.app.name, _scaling(served.app)
        tracked = self._tracked.setdefault(name, Tracked(begin(now)))
        tracked.load.note(now, totals, self._fleet.of(name))
        tracked.seen = Observation(
            now,
            len(self._reconciler.endpoints.get(name, ())),
            tracked.load.queue_delay_s(served.arm.queue_max_wait_s),
            tracked.load.busy,
            tracked.load.rate,
            totals.waiting,
            floor,
            totals.in_flight,
        )
        decision = decide(scaling, wanted, tracked.seen, tracked.memory)
        tracked.memory, tracked.reason = decision.memory, decision.reason
        return decision

    def _placed(
        self,
        decision: Decision,
        app: AppSpec,
        before: int,
        state: State,
        records: Sequence[Record],
    ) -> Decision:
        """The decision with as many replicas as there is room for."""
        refused = ""
        for wanted in range(decision.wanted, before, -1):
            asked = replace(state, scaled={**state.scaled, app.name: wanted})
            why = self._no_room(asked, records, app.name)
            if why is None:
                break
            refused = refused or f"; no room for {wanted}: {why}"
        else:
            wanted = min(before, decision.wanted)
        reason = f"{decision.reason}{refused}"
        self._tracked[app.name].reason = reason
        return replace(decision, wanted=wanted, reason=reason)


def _by_app(state: State) -> dict[str, ServedVersion]:
    return {s.app.name: s for m in state.routed.models.values() for s in m.versions.values()}


def _scaling(app: AppSpec) -> Scaling:
    assert app.scaling is not None
    return app.scaling


def _floor(state: State, records: Sequence[Record], app: AppSpec) -> int:
    """What rollouts need of an application.

    Until the bake ends either arm may have to take all traffic at once, and after it the old
    version, for as long as it is kept to be gone back to.
    """
    floor = 0
    for record in records:
        rollout = record.rollout
        mine = app.replica.model == rollout.model
        if not mine or app.replica.version not in (rollout.stable, rollout.canary):
            continue
        if not record.live or record.released:
            continue
        if rollout.active:
            floor = max(floor, 1, *(state.wanted(arm) for arm in _apps(state, record)))
        elif app.replica.version == rollout.stable:
            floor = max(floor, 1, state.wanted(app))
    return floor


def _apps(state: State, record: Record) -> list[AppSpec]:
    """The applications of a rollout's arms, as they are now."""
    found = []
    for layout in (state.routed, state.desired):
        model = layout.models.get(record.rollout.model)
        versions = model.versions if model is not None else {}
        arms = (record.rollout.stable, record.rollout.canary)
        found += [versions[arm].app for arm in arms if arm in versions]
    return found


def _entry(now: float, app: AppSpec, before: int, after: int, reason: str) -> AuditEntry:
    replica = app.replica
    body = {"app": app.name, "version": replica.version, "from": before, "to": after}
    return AuditEntry(now, CONTROLLER, ACTION, replica.model, {**body, "reason": reason})
