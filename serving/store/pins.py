"""Pins and versions' first digests, on a connection and within a transaction of the store's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, select

from serving.store.schema import pins, versions
from serving.store.statements import insert_into, upsert


@dataclass(frozen=True, slots=True)
class PinRow:
    """A version reference that was made definite. `resolved_at` is Unix time in seconds."""

    model: str
    ref: str
    version: str
    digest: str
    resolved_at: float


def read(db: Connection) -> list[PinRow]:
    """Every pin, by model and reference."""
    rows = db.execute(select(pins).order_by(pins.c.model, pins.c.ref))
    return [PinRow(**row) for row in rows.mappings()]


def save(db: Connection, pin: PinRow) -> None:
    """Add a pin, or replace the one of the same model and reference."""
    upsert(db, pins, asdict(pin))


def replace(db: Connection, rows: Sequence[PinRow]) -> None:
    """Replace all pins, and add their digests to those of `digests`."""
    db.execute(delete(pins))
    for pin in rows:
        save(db, pin)
        _add_digest(db, pin)


def digests(db: Connection) -> dict[tuple[str, str], str]:
    """(model, version) to the digest that it had when it was first applied."""
    rows = db.execute(select(versions.c.model, versions.c.version, versions.c.digest))
    return {(row.model, row.version): row.digest for row in rows}


def _add_digest(db: Connection, pin: PinRow) -> None:
    """Insert, or change nothing where the version's is there."""
    row = {
        "model": pin.model,
        "version": pin.version,
        "digest": pin.digest,
        "first_applied_at": pin.resolved_at,
    }
    keys = list(versions.primary_key)
    statement = insert_into(db, versions).values(row)
    db.execute(statement.on_conflict_do_nothing(index_elements=keys))
