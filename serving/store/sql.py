"""The control store's operations. Each is one transaction; each may raise `StoreError`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select

from serving.errors import StoreError
from serving.store import audit as audit_log
from serving.store import cordons as cordon_rows
from serving.store import documents, gpu_errors
from serving.store import engine as engines
from serving.store import ledger as ledger_rows
from serving.store import memory_profiles as profile_rows
from serving.store import pins as pin_rows
from serving.store import rollouts as rollout_rows
from serving.store.audit import AuditEntry, AuditRow, Head
from serving.store.cordons import CordonRow
from serving.store.gpu_errors import FatalErrorRow
from serving.store.ledger import LedgerRow
from serving.store.memory_profiles import ProfileRow
from serving.store.pins import PinRow
from serving.store.rollouts import RolloutRow
from serving.store.schema import counters, events
from serving.store.statements import upsert


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log. `id` grows; `at` is Unix time in seconds."""

    id: int
    at: float
    kind: str
    body: Mapping[str, Any]


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
            return pin_rows.read(db)

    def save_pin(self, model: str, ref: str, version: str, digest: str, resolved_at: float) -> None:
        """Add a pin, or replace the one of the same model and reference."""
        with self._write() as db:
            pin_rows.save(db, PinRow(model, ref, version, digest, resolved_at))

    # What was asked for.

    def desired(self) -> dict[str, Any] | None:
        """The document that was last saved, or None."""
        with self._read() as db:
            return documents.read_desired(db)

    def desired_revision(self) -> int:
        """How often the document was saved."""
        with self._read() as db:
            return documents.desired_revision(db)

    def save_desired(self, config: dict[str, Any], *, expected: int | None = None) -> None:
        """Replace the document; its revision becomes one more.

        Raises `ConflictError`, and changes nothing, if `expected` is given and is not its revision.
        """
        with self._write() as db:
            documents.save_desired(db, config, expected=expected, at=self._clock())

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
                documents.save_desired(db, desired, expected=expected, at=self._clock())
            if pins is not None:
                pin_rows.replace(db, pins)
            for row in rollouts:
                rollout_rows.save(db, row, at=self._clock())
            if route_table is not None:
                documents.save_route_table(db, route_table, at=self._clock())
            audit_log.append(db, audit)
            if event is not None:
                self._append(db, *event)

    def digests(self) -> dict[tuple[str, str], str]:
        """(model, version) to the digest that it had when it was first applied."""
        with self._read() as db:
            return pin_rows.digests(db)

    # What gateways were told.

    def next_revision(self) -> int:
        """A route table revision above that of every table saved so far."""
        with self._read() as db:
            return documents.route_table_revision(db) + 1

    def route_table(self) -> dict[str, Any] | None:
        """The table that was last saved, or None."""
        with self._read() as db:
            return documents.read_route_table(db)

    def save_route_table(self, table: dict[str, Any]) -> None:
        """Replace the route table. `table["revision"]` must be above the saved one's.

        Raises `ConflictError` if it is not: another controller has published meanwhile.
        """
        with self._write() as db:
            documents.save_route_table(db, table, at=self._clock())

    # Rollouts.

    def rollouts(
        self, *, active: bool | None = None, model: str | None = None, limit: int = 100
    ) -> list[RolloutRow]:
        """At most `limit` rollouts, newest first; `active`: only those not finished, or only those.

        `model`: of this model only.
        """
        with self._read() as db:
            return rollout_rows.read(db, active=active, model=model, limit=limit)

    def rollout(self, rollout_id: str) -> RolloutRow | None:
        """The rollout of this id."""
        with self._read() as db:
            return rollout_rows.find(db, rollout_id)

    def count_rollouts(self, model: str) -> int:
        """How many rollouts a model has had."""
        with self._read() as db:
            return rollout_rows.count(db, model)

    # GPUs.

    def cordons(self) -> list[CordonRow]:
        """Every GPU that is cordoned, by UUID."""
        with self._read() as db:
            return cordon_rows.read(db)

    def save_cordons(
        self, rows: Sequence[CordonRow], lifted: Sequence[str], audit: Sequence[AuditEntry]
    ) -> None:
        """Add or replace cordons, lift those of the UUIDs `lifted`, and append to the audit log.

        All together or not at all.
        """
        with self._write() as db:
            cordon_rows.save(db, rows, lifted)
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
            return profile_rows.read(db)

    def save_memory_profiles(self, rows: Sequence[ProfileRow]) -> None:
        """Add profiles, or replace those of the same bundle, type of device and runtime."""
        with self._write() as db:
            profile_rows.save(db, rows)

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
