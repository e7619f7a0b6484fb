"""The control store's operations. Each is one transaction; each may raise `StoreError`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Table, delete, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from serving.errors import ConflictError
from serving.store import engine as engines
from serving.store.schema import counters, desired, events, pins, route_table, versions


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
            _upsert(db, pins, asdict(PinRow(model, ref, version, digest, resolved_at)))

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

    def apply(
        self,
        config: dict[str, Any],
        new_pins: Sequence[PinRow],
        event: tuple[str, dict[str, Any]],
        *,
        expected: int | None = None,
    ) -> None:
        """Replace the document and all pins, and log `event` (kind, body), together or not at all.

        The pins' digests are added to those of `digests`. Raises `ConflictError` as `save_desired`
        does.
        """
        with self._write() as db:
            self._save_desired(db, config, expected)
            db.execute(delete(pins))
            for pin in new_pins:
                _upsert(db, pins, asdict(pin))
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
        revision = int(table["revision"])
        with self._write() as db:
            if revision <= (saved := _revision(db, route_table)):
                raise ConflictError(
                    f"route table revision {revision} is not above the saved revision {saved}: "
                    "another controller writes to this store"
                )
            row = {"id": 1, "revision": revision, "body": table, "updated_at": self._clock()}
            _upsert(db, route_table, row)

    # Totals.

    def counters(self) -> dict[str, dict[str, Any]]:
        """Every saved blob of totals, by instance."""
        with self._read() as db:
            rows = db.execute(select(counters.c.instance, counters.c.body))
            return {row.instance: row.body for row in rows}

    def save_counters(self, instance: str, blob: dict[str, Any]) -> None:
        """Replace one instance's blob."""
        with self._write() as db:
            row = {"instance": instance, "body": blob, "updated_at": self._clock()}
            _upsert(db, counters, row)

    def fold_counters(self, instance: str, blob: dict[str, Any], folded: Sequence[str]) -> None:
        """Replace one instance's blob and drop those of `folded`, together or not at all."""
        with self._write() as db:
            row = {"instance": instance, "body": blob, "updated_at": self._clock()}
            _upsert(db, counters, row)
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
        _upsert(db, desired, row)

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


def _insert_once(db: Connection, table: Table, row: dict[str, Any]) -> None:
    """Insert, or change nothing where the row's key is there."""
    keys = list(table.primary_key)
    db.execute(_insert(db, table).values(row).on_conflict_do_nothing(index_elements=keys))


def _insert(db: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    postgres = db.dialect.name == "postgresql"
    return postgresql.insert(table) if postgres else sqlite.insert(table)


def _upsert(db: Connection, table: Table, row: dict[str, Any]) -> None:
    statement = _insert(db, table).values(row)
    changed = {name: statement.excluded[name] for name in row if name not in table.primary_key}
    keys = list(table.primary_key)
    db.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))
