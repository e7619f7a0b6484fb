"""The rollouts that run: observe, decide, commit, publish, tell.

One tick moves every model's first rollout by at most one transition. What it changes is one
transaction: the rollouts, the desired state where the default version changes, the route table and
the audit log. Publishing and telling come after it and may be repeated or lost: the next tick, of
this controller or of its successor, starts from what was committed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from serving.control import journal
from serving.control.endings import applied, ended_with_deployment, let_go, superseded
from serving.control.intents import Intent
from serving.control.observe import Observer
from serving.control.overlay import lay_out, switch, with_splits
from serving.control.reach import Reach
from serving.control.reconcile import Blocking, Clock, Reconciler
from serving.control.records import Record
from serving.control.rollout_decisions import Decisions
from serving.control.rollout_telling import RETOLD_S, Telling
from serving.control.rollout_views import arms_summary
from serving.control.state import Providers, State
from serving.core.plan import ServedModel, ServedVersion
from serving.core.rollout import command, new_rollout
from serving.core.rollout_spec import RolloutSpec
from serving.errors import ConflictError, NotFound
from serving.store.audit import AuditEntry
from serving.store.pins import PinRow
from serving.store.rollouts import RolloutRow
from serving.store.sql import Store

COMMANDS: Final = ("pause", "resume", "promote", "approve", "abort", "rollback")
"""What a person may tell a rollout."""


def _new_salt() -> str:
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class Change:
    """What goes into a commit beside the rollouts themselves.

    `cleared` are rollouts long over whose versions are held no longer.
    """

    state: State | None = None
    audit: tuple[AuditEntry, ...] = ()
    pins: Sequence[PinRow] | None = None
    event: tuple[str, dict[str, Any]] | None = None
    cleared: tuple[Record, ...] = ()


class Rollouts:
    """Every rollout that is not over, oldest first. The first of a model runs, others wait.

    Lives on the controller's loop; whoever calls what changes something holds the reconciler's
    lock. `new_salt` gives what makes assignment unpredictable.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        observer: Observer,
        *,
        store: Store,
        in_store: Blocking,
        clock: Clock,
        providers: Providers,
        new_salt: Callable[[], str] = _new_salt,
    ) -> None:
        self.records: tuple[Record, ...] = ()
        self.observer = observer
        self.reach = Reach()
        # By model: the last rollback that was measured, and how long it took in milliseconds.
        self.rollbacks: dict[str, tuple[str, float]] = {}
        self._reconciler = reconciler
        self._store, self._in_store = store, in_store
        self._clock = clock
        self._decisions = Decisions(reconciler, observer, providers, clock)
        self._telling = Telling(reconciler, providers, clock)
        self._new_salt = new_salt
        self._urgent = False
        reconciler.recall_rollouts = self.recall

    async def load(self, blank: State | None = None) -> None:
        """Take up what was saved. Raises `StoreError`.

        With a `blank` state to begin with, nothing of what was saved runs any more: every rollout
        that was going on is over.
        """
        records = await self._stored()
        self._adopt(records)
        if blank is not None:
            ended = [ended_with_deployment(r, self._clock.unix()) for r in self.records]
            await self._commit(ended, Change(blank))
        self._telling.tell_again(records)

    async def recall(self) -> None:
        """Go by the store after a commit that may have been done: publish and tell it, if it was.

        Raises `StoreError`.
        """
        before = {r.rollout.id: r for r in self.records}
        after = [r for r in await self._stored() if r.live or r.rollout.id in before]
        self._committed(before, after, self._clock.unix())

    async def _stored(self) -> list[Record]:
        """Every rollout that is not over or was not lately, oldest first."""
        rows = await self._in_store(partial(self._store.rollouts, active=True, limit=10_000))
        past = await self._in_store(partial(self._store.rollouts, active=False, limit=1000))
        for row in reversed(past):
            self._note_rollback(row.model, row.id, row.body.get("rollback_ms"))
        lately = self._clock.unix() - RETOLD_S
        rows += [row for row in past if _warm(row) or (row.finished_at or 0.0) > lately]
        records = [Record.from_row(row) for row in reversed(rows)]
        return sorted(records, key=lambda r: r.rollout.created_at)

    # Looking.

    @property
    def tick_s(self) -> float | None:
        """How often the most impatient rollout wants to be looked at; None without any."""
        return min((r.rollout.spec.analysis.tick_s for r in self.records), default=None)

    def of(self, model: str) -> list[Record]:
        """A model's rollouts that run or wait, oldest first."""
        return [r for r in self.records if r.rollout.model == model and r.rollout.active]

    async def find(self, key: str) -> Record:
        """The rollout of an id, or a model's newest. Raises `NotFound` or `StoreError`."""
        for record in reversed(self.records):
            if record.rollout.id == key:
                return record
        if of_model := [r for r in self.records if r.rollout.model == key]:
            return of_model[-1]
        row = await self._in_store(self._store.rollout, key)
        if row is None:
            found = await self._in_store(partial(self._store.rollouts, model=key, limit=1))
            row = found[0] if found else None
        if row is None:
            raise self._unknown(key)
        return Record.from_row(row)

    async def check_model(self, name: str) -> None:
        """Raise `NotFound` for a model that is not served and never had a rollout, or `StoreError`.

        So a name that was misspelled is not taken for one without rollouts.
        """
        models = self._reconciler.state.desired.models
        ever = partial(self._store.rollouts, model=name, limit=1)
        if name not in models and not await self._in_store(ever):
            served = ", ".join(sorted(models)) or "none"
            raise NotFound(f"model {name!r} is not served, and had no rollout; served: {served}")

    def _unknown(self, key: str) -> NotFound:
        models = self._reconciler.state.desired.models
        if key in models:
            version = models[key].version
            return NotFound(
                f"model {key!r} is served, by version {version}, and has had no rollout yet"
            )
        return NotFound(
            f"there is no rollout {key!r}, and no model of this name is served; "
            f"served: {', '.join(sorted(models)) or 'none'}"
        )

    async def latest_to(self, model: str, version: str, digest: str) -> Record | None:
        """The newest rollout of a model to this version. Raises `StoreError`."""
        rows = await self._in_store(partial(self._store.rollouts, model=model, limit=1000))
        for row in rows:
            body = row.body["rollout"]
            if (body["canary"], body["canary_digest"]) == (version, digest):
                running = [r for r in self.records if r.rollout.id == row.id]
                return running[0] if running else Record.from_row(row)
        return None

    # Changing.

    def hurry(self) -> None:
        """The next tick looks at every rollout, whatever its interval."""
        self._urgent = True

    async def tick(self, *, gateways_known: bool) -> None:
        """Look at every model's first rollout once. Raises `StoreError` or `ConflictError`."""
        urgent, self._urgent = self._urgent, False
        heads = {id(r) for r in self._heads(self.records)}
        self.observer.begin()
        after = [
            self._decisions.decided_alone(r, gateways_known, urgent) if id(r) in heads else r
            for r in self.records
        ]
        try:
            await self._commit(after, Change())
        except BaseException:
            # What it has seen is not decided yet.
            self._urgent = True
            raise
        self.observer.saved()

    async def command(
        self, key: str, name: str, *, actor: str, reason: str, expected_state: str | None
    ) -> Record:
        """Do as a person says. Raises `NotFound`, `ConflictError` or `StoreError`."""
        if name not in COMMANDS:
            raise NotFound(f"a rollout has no command {name!r}; allowed: {', '.join(COMMANDS)}")
        record = await self.find(key)
        rollout, now = record.rollout, self._clock.unix()
        if expected_state is not None and expected_state != rollout.state.value:
            raise ConflictError(
                f"rollout {rollout.id} is {rollout.state.value} now, not {expected_state} "
                f"({rollout.actor}: {rollout.reason}); look at it again"
            )
        told = replace(record, rollout=command(rollout, name, actor, reason, now))
        after = [told if r.rollout.id == rollout.id else r for r in self.records]
        await self._commit(after, Change(), journal.Told(rollout.id, name, actor, reason))
        return told

    async def begin(
        self,
        model: str,
        stable: ServedVersion,
        canary: ServedVersion,
        spec: RolloutSpec,
        *,
        actor: str,
        reason: str,
    ) -> Record:
        """A new rollout, not committed yet. Raises `StoreError`."""
        number = 1 + await self._in_store(self._store.count_rollouts, model)
        versions = {s.arm.version: s for s in (stable, canary)}
        rollout = new_rollout(
            # No model's name has a colon.
            f"{model}:{number}",
            model=model,
            stable=(stable.arm.version, stable.arm.digest),
            canary=(canary.arm.version, canary.arm.digest),
            spec=spec,
            salt=self._new_salt(),
            actor=actor,
            reason=reason,
            now=self._clock.unix(),
        )
        return Record(rollout, ServedModel(stable.arm.version, versions))

    async def apply(
        self,
        intents: Mapping[str, Intent],
        gone: Iterable[str],
        started: Sequence[Record],
        change: Change,
        *,
        actor: str,
    ) -> None:
        """Commit an apply: what its intents end, and the rollouts that it starts.

        `gone` are models that are no longer served. Raises `StoreError` or `ConflictError`.
        """
        now = self._clock.unix()
        removed = set(gone)
        after = []
        for record in self.records:
            model = record.rollout.model
            if model in removed:
                after.append(superseded(record, f"model {model} is removed", actor, now, True))
            elif (intent := intents.get(model)) is not None:
                after.append(applied(record, intent, actor, now))
            else:
                after.append(record)
        known = {r.rollout.id for r in self.records}
        cleared = tuple(
            replace(i.cleared, cleared=True)
            for i in intents.values()
            if i.cleared is not None and i.cleared.rollout.id not in known
        )
        await self._commit([*after, *started], replace(change, cleared=cleared))

    async def start(self, record: Record, change: Change) -> None:
        """Commit a rollout that a person starts. Raises `StoreError` or `ConflictError`."""
        model = record.rollout.model
        after = [let_go(r) if r.rollout.model == model else r for r in self.records]
        await self._commit([*after, record], change)

    @staticmethod
    def _heads(records: Iterable[Record]) -> list[Record]:
        first: dict[str, Record] = {}
        for record in records:
            if record.live:
                first.setdefault(record.rollout.model, record)
        return list(first.values())

    async def _commit(
        self, after: Sequence[Record], change: Change, told: journal.Told | None = None
    ) -> None:
        """Write what has changed and go by it; with nothing changed, publish who is there."""
        before = {r.rollout.id: r for r in self.records}
        now, decided_at = self._clock.unix(), self._clock.monotonic()
        changed = [r for r in after if _differs(before.get(r.rollout.id), r)]
        counts = self._reconciler.totals.trials.counts
        price = self._reconciler.price
        changed = [
            replace(r, arms=arms_summary(counts(r.rollout.id), price) or r.arms) for r in changed
        ]
        for record in changed:
            if record.taking_back and not _was(before, record):
                self.reach.decided(record.rollout.id, decided_at)
        changed = [self._measured(r) if _was(before, r) else r for r in changed]
        fresh = {r.rollout.id: r for r in changed}
        after = [fresh.get(r.rollout.id, r) for r in after]
        heads = self._heads(after)
        state = change.state or self._reconciler.state
        for record in (*(r for r in after if not r.live), *heads):
            state = replace(
                state,
                desired=lay_out(state.desired, record, state.also.get(record.rollout.model, ())),
                routed=switch(state.routed, record),
            )
        audit = list(change.audit)
        for record in changed:
            rollout_id = record.rollout.id
            audit += journal.entries(before.get(rollout_id), record, now, told)
        await self._reconciler.commit(
            state,
            overlay=partial(with_splits, records=heads),
            rollouts=[r.to_row() for r in (*change.cleared, *changed)],
            audit=audit,
            pins=change.pins,
            event=change.event,
        )
        self.reach.keep({r.rollout.id for r in after if r.taking_back})
        self._committed(before, after, now)

    def _committed(self, before: Mapping[str, Record], after: Sequence[Record], now: float) -> None:
        """Go by what is in the store and published, and tell of it."""
        gateways, revision = self.observer.gateways(), self._reconciler.board.revision
        for record in after:
            model, rollout_id = record.rollout.model, record.rollout.id
            if record.taking_back and not _was(before, record):
                self.reach.published(rollout_id, revision, gateways, self._clock.monotonic())
            self._note_rollback(model, rollout_id, record.rollback_ms)
        self._adopt(after)
        for record in after:
            self._telling.tell(before.get(record.rollout.id), record, now)

    def _measured(self, record: Record) -> Record:
        """With how long its rollback took, once it has come to its end."""
        took_s = self.reach.took(record.rollout.id, self.observer.gateways())
        if record.taking_back or took_s is None:
            return record
        return replace(record, rollback_ms=round(1000 * took_s, 3))

    def _note_rollback(self, model: str, rollout_id: str, took_ms: float | None) -> None:
        if took_ms is not None:
            self.rollbacks[model] = (rollout_id, took_ms)

    def _adopt(self, records: Sequence[Record]) -> None:
        for record in records:
            if not record.live:
                self._decisions.forget(record.rollout.id)
                self.observer.forget(record.rollout)
        self.records = tuple(r for r in records if r.live)
        self._reconciler.overlay = partial(with_splits, records=self._heads(self.records))
        self._reconciler.totals.trials.live = {r.rollout.id for r in self.records}


def _warm(row: RolloutRow) -> bool:
    return row.body["rollout"]["warm_until"] is not None


def _was(before: Mapping[str, Record], record: Record) -> bool:
    """Whether it was being taken back."""
    known = before.get(record.rollout.id)
    return known is not None and known.taking_back


def _differs(before: Record | None, after: Record) -> bool:
    if before is None:
        return True
    return before.durable() != after.durable() or before.remembered != after.remembered
