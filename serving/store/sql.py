"""The control store's operations. Each is one transaction; each may raise `StoreError`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Table, delete, func, insert, select

from serving.errors import ConflictError, StoreError
from serving.store import audit as audit_log
from serving.store import engine as engines
from serving.store import gpu_errors
from serving.store import ledger as ledger_rows
from serving.store.audit import AuditEntry, AuditRow, Head
from serving.store.gpu_errors import FatalErrorRow
from serving.store.ledger import LedgerRow
from serving.store.schema import (
    counters,
    desired,
    events,
    gpu_cordons,
    memory_profiles,
    pins,
    route_table,
    versions,
)
from serving.store.schema import rollouts as rollout_table
from serving.store.statements import insert_into, upsert


@dataclass(frozen=True, slots=True)
class PinRow:
    """A version reference that was made definite. `resolved_at` is Unix time in seconds."""

    model: str
    ref: str
    version: str
    digest: str
    resolved_at: float


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log. `id` grows; `at` is Unix time in seconds."""

    id: int
    at: float
    kind: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """A rollout. `body` is its writer's; `finished_at` is None while ticks can still change it."""

    id: str
    model: str
    state: str
    body: Mapping[str, Any]
    created_at: float
    finished_at: float | None


@dataclass(frozen=True, slots=True)
class CordonRow:
    """A GPU on which nothing new is to start, who said so and why. `at` is Unix seconds."""

    uuid: str
    reason: str
    actor: str
    at: float


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """What the bundle `digest` was measured to take: `MemoryProfile.to_dict`; a learned ceiling."""

    digest: str
    device_type: str
    runtime: str
    profile: dict[str, Any]
    ceiling: int | None = None


def open_store(url: str, *, clock: Callable[[], float] = time.time) -> Store:
    """Connect to `url`, create or migrate its tables. Raises `StoreError`.

    `clock` gives Unix time in seconds, for the rows' times.
    """
    engine = engines.connect(url)
    try:
        engines.upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine, clock)


class Store:
    """What the controller keeps. Safe to use from several threads; one works at a time."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            self._engine.dispose()

    # Pins.

    def get_pins(self) -> list[PinRow]:
        """Every pin, by model and reference."""
        with self._read() as db:
            rows = db.execute(select(pins).order_by(pins.c.model, pins.c.ref))
            return [PinRow(**row) for row in rows.mappings()]

    def save_pin(self, model: str, ref: str, version: str, digest: str, resolved_at: float) -> None:
        """Add a pin, or replace the one of the same model and reference."""
        with self._write() as db:
            upsert(db, pins, asdict(PinRow(model, ref, version, digest, resolved_at)))

    # What was asked for.

    def desired(self) -> dict[str, Any] | None:
        """The document that was last saved, or None."""
        with self._read() as db:
            return db.execute(select(desired.c.config)).scalar_one_or_none()

    def desired_revision(self) -> int:
        """How often the document was saved."""
        with self._read() as db:
            return _revision(db, desired)

    def save_desired(self, config: dict[str, Any], *, expected: int | None = None) -> None:
        """Replace the document; its revision becomes one more.

        Raises `ConflictError`, and changes nothing, if `expected` is given and is not its revision.
        """
        with self._write() as db:
            self._save_desired(db, config, expected)

    def commit(
        self,
        *,
        desired: dict[str, Any] | None = None,
        expected: int | None = None,
        pins: Sequence[PinRow] | None = None,
        rollouts: Sequence[RolloutRow] = (),
        route_table: dict[str, Any] | None = None,
        audit: Sequence[AuditEntry] = (),
        event: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        """Write what changed, together or not at all.

        `desired` replaces the document, `pins` all pins (their digests are added to those of
        `digests`), `rollouts` their rows, `route_table` the table; `audit` and `event` (kind, body)
        are appended to their logs. Raises `ConflictError` as `save_desired` and `save_route_table`
        do.
        """
        with self._write() as db:
            if desired is not None:
                self._save_desired(db, desired, expected)
            if pins is not None:
                _replace_pins(db, pins)
            for row in rollouts:
                upsert(db, rollout_table, {**asdict(row), "updated_at": self._clock()})
            if route_table is not None:
                self._save_route_table(db, route_table)
            audit_log.append(db, audit)
            if event is not None:
                self._append(db, *event)

    def digests(self) -> dict[tuple[str, str], str]:
        """(model, version) to the digest that it had when it was first applied."""
        with self._read() as db:
            rows = db.execute(select(versions.c.model, versions.c.version, versions.c.digest))
            return {(row.model, row.version): row.digest for row in rows}

    # What gateways were told.

    def next_revision(self) -> int:
        """A route table revision above that of every table saved so far."""
        with self._read() as db:
            return _revision(db, route_table) + 1

    def route_table(self) -> dict[str, Any] | None:
        """The table that was last saved, or None."""
        with self._read() as db:
            return db.execute(select(route_table.c.body)).scalar_one_or_none()

    def save_route_table(self, table: dict[str, Any]) -> None:
        """Replace the route table. `table["revision"]` must be above the saved one's.

        Raises `ConflictError` if it is not: another controller has published meanwhile.
        """
        with self._write() as db:
            self._save_route_table(db, table)

    # Rollouts.

    def rollouts(
        self, *, active: bool | None = None, model: str | None = None, limit: int = 100
    ) -> list[RolloutRow]:
        """At most `limit` rollouts, newest first; `active`: only those not finished, or only those.

        `model`: of this model only.
        """
        found = rollout_table.c
        query = select(*(found[name] for name in RolloutRow.__dataclass_fields__))
        if active is not None:
            query = query.where(found.finished_at.is_(None) == active)
        if model is not None:
            query = query.where(found.model == model)
        query = query.order_by(found.created_at.desc(), found.id.desc()).limit(limit)
        with self._read() as db:
            return [RolloutRow(**row) for row in db.execute(query).mappings()]

    def rollout(self, rollout_id: str) -> RolloutRow | None:
        """The rollout of this id."""
        found = rollout_table.c
        query = select(*(found[name] for name in RolloutRow.__dataclass_fields__))
        with self._read() as db:
            row = db.execute(query.where(found.id == rollout_id)).mappings().one_or_none()
            return None if row is None else RolloutRow(**row)

    def count_rollouts(self, model: str) -> int:
        """How many rollouts a model has had."""
        with self._read() as db:
            query = select(func.count()).where(rollout_table.c.model == model)
            return db.execute(query).scalar_one()

    # GPUs.

    def cordons(self) -> list[CordonRow]:
        """Every GPU that is cordoned, by UUID."""
        with self._read() as db:
            rows = db.execute(select(gpu_cordons).order_by(gpu_cordons.c.uuid))
            return [CordonRow(**row) for row in rows.mappings()]

    def save_cordons(
        self, rows: Sequence[CordonRow], lifted: Sequence[str], audit: Sequence[AuditEntry]
    ) -> None:
        """Add or replace cordons, lift those of the UUIDs `lifted`, and append to the audit log.

        All together or not at all.
        """
        with self._write() as db:
            for row in rows:
                upsert(db, gpu_cordons, asdict(row))
            db.execute(delete(gpu_cordons).where(gpu_cordons.c.uuid.in_(lifted)))
            gpu_errors.forget(db, lifted)
            audit_log.append(db, audit)

    def fatal_gpu_errors(self, since: float) -> list[FatalErrorRow]:
        """Those that are not older than `since`, oldest first."""
        with self._read() as db:
            return gpu_errors.read(db, since)

    def save_fatal_gpu_errors(self, rows: Sequence[FatalErrorRow], since: float) -> None:
        """Add errors, and drop those that are older than `since`."""
        with self._write() as db:
            gpu_errors.save(db, rows, since)

    def memory_profiles(self) -> list[ProfileRow]:
        """What every bundle was measured to take."""
        with self._read() as db:
            return [ProfileRow(**row) for row in db.execute(select(memory_profiles)).mappings()]

    def save_memory_profiles(self, rows: Sequence[ProfileRow]) -> None:
        """Add profiles, or replace those of the same bundle, type of device and runtime."""
        with self._write() as db:
            for row in rows:
                upsert(db, memory_profiles, asdict(row))

    # The ledger.

    def post_ledger(
        self,
        rows: Sequence[LedgerRow],
        cursors: Mapping[str, Mapping[str, Any]],
        dropped: Sequence[str],
        *,
        expected: int,
    ) -> None:
        """Add rows, replace cursors, drop those of `dropped`: together or not at all.

        Raises `ConflictError` if the ledger's revision is not `expected`; it becomes one more.
        """
        with self._write() as db:
            ledger_rows.post(db, rows, cursors, dropped, expected=expected, at=self._clock())

    def ledger_cursors(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """The ledger's revision, and every cursor by its id."""
        with self._read() as db:
            return ledger_rows.revision(db), ledger_rows.cursors(db)

    def ledger(self, since: int | None = None) -> list[LedgerRow]:
        """Each account's sum over the minutes from `since` (Unix seconds), or over all time."""
        with self._read() as db:
            return ledger_rows.sums(db, since)

    def fold_ledger(self, before: int) -> None:
        """Sum up the minutes before `before` (Unix seconds) in one row an account."""
        with self._write() as db:
            ledger_rows.fold(db, before)

    # The audit log.

    def audit(
        self, *, after: int | None = None, limit: int = 100, subject: str | None = None
    ) -> list[AuditRow]:
        """At most `limit` entries, oldest first: those after number `after`, or else the last ones.

        `subject`: only those about one rollout or model.
        """
        with self._read() as db:
            return audit_log.read(db, after=after, limit=limit, subject=subject)

    def verify_audit(self, expect: Head | None = None) -> Head:
        """Where the intact log ends; `expect` is where it did once, as was noted elsewhere.

        Others can write between its pages. Raises `StoreError` that names the first bad entry.
        """
        known = self._audit_head()
        rows = audit_log.pages(lambda after, limit: self.audit(after=after, limit=limit))
        found = audit_log.verify(rows, [end for end in (known, expect) if end is not None])
        now = self._audit_head()
        if found.count > (now.count if now is not None else 0):
            raise StoreError(
                f"audit log: it ends with entry {found.count}, but by the record of its end with "
                f"{now.count if now is not None else 'none'}: one of them was changed"
            )
        return found

    def _audit_head(self) -> Head | None:
        with self._read() as db:
            return audit_log.head(db)

    # Totals.

    def counters(self) -> dict[str, dict[str, Any]]:
        """Every saved blob of totals, by instance."""
        with self._read() as db:
            rows = db.execute(select(counters.c.instance, counters.c.body))
            return {row.instance: row.body for row in rows}

    def save_counters(self, blobs: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the blobs of some instances, together or not at all."""
        with self._write() as db:
            for instance, blob in blobs.items():
                row = {"instance": instance, "body": dict(blob), "updated_at": self._clock()}
                upsert(db, counters, row)

    def fold_counters(self, instance: str, blob: dict[str, Any], folded: Sequence[str]) -> None:
        """Replace one instance's blob and drop those of `folded`, together or not at all."""
        with self._write() as db:
            row = {"instance": instance, "body": blob, "updated_at": self._clock()}
            upsert(db, counters, row)
            db.execute(delete(counters).where(counters.c.instance.in_(folded)))

    # The log.

    def append_event(self, kind: str, body: dict[str, Any]) -> None:
        """Add a line to the log."""
        with self._write() as db:
            self._append(db, kind, body)

    def events(self, *, after: int = 0, limit: int = 100) -> list[Event]:
        """At most `limit` lines with an id above `after`, oldest first."""
        query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
        with self._read() as db:
            return [Event(**row) for row in db.execute(query).mappings()]

    def _save_desired(self, db: Connection, config: dict[str, Any], expected: int | None) -> None:
        revision = _revision(db, desired)
        if expected is not None and expected != revision:
            raise ConflictError(
                f"the configuration is at revision {revision}, not {expected}: "
                "someone else changed it; look at it again and repeat"
            )
        row = {"id": 1, "revision": revision + 1, "config": config, "updated_at": self._clock()}
        upsert(db, desired, row)

    def _save_route_table(self, db: Connection, table: dict[str, Any]) -> None:
        revision = int(table["revision"])
        if revision <= (saved := _revision(db, route_table)):
            raise ConflictError(
                f"route table revision {revision} is not above the saved revision {saved}: "
                "another controller writes to this store"
            )
        row = {"id": 1, "revision": revision, "body": table, "updated_at": self._clock()}
        upsert(db, route_table, row)

    def _append(self, db: Connection, kind: str, body: dict[str, Any]) -> None:
        db.execute(insert(events).values(at=self._clock(), kind=kind, body=body))

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._lock, engines.begin(self._engine, write=False) as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._lock, engines.begin(self._engine, write=True) as connection:
            yield connection


def _revision(db: Connection, table: Table) -> int:
    """The revision in a one-row table; 0 without a row."""
    return db.execute(select(table.c.revision)).scalar_one_or_none() or 0


def _replace_pins(db: Connection, rows: Sequence[PinRow]) -> None:
    db.execute(delete(pins))
    for pin in rows:
        upsert(db, pins, asdict(pin))
        _insert_once(
            db,
            versions,
            {
                "model": pin.model,
                "version": pin.version,
                "digest": pin.digest,
                "first_applied_at": pin.resolved_at,
            },
        )


def _insert_once(db: Connection, table: Table, row: dict[str, Any]) -> None:
    """Insert, or change nothing where the row's key is there."""
    keys = list(table.primary_key)
    db.execute(insert_into(db, table).values(row).on_conflict_do_nothing(index_elements=keys))
