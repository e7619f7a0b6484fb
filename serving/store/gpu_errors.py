"""Fatal errors of GPUs, on a connection and within a transaction of the store's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, select

from serving.store.schema import gpu_fatal_errors
from serving.store.statements import upsert


@dataclass(frozen=True, slots=True)
class FatalErrorRow:
    """A replica that a fatal error of the GPU `uuid` has ended. `at` is Unix seconds."""

    uuid: str
    replica: str
    at: float


def read(db: Connection, since: float) -> list[FatalErrorRow]:
    """Those that are not older than `since`, oldest first."""
    table = gpu_fatal_errors
    found = db.execute(select(table).where(table.c.at >= since).order_by(table.c.at))
    return [FatalErrorRow(**row) for row in found.mappings()]


def save(db: Connection, rows: Sequence[FatalErrorRow], since: float) -> None:
    """Add errors, and drop those that are older than `since`."""
    for row in rows:
        upsert(db, gpu_fatal_errors, asdict(row))
    db.execute(delete(gpu_fatal_errors).where(gpu_fatal_errors.c.at < since))


def forget(db: Connection, uuids: Sequence[str]) -> None:
    """Hold nothing against these GPUs any more."""
    db.execute(delete(gpu_fatal_errors).where(gpu_fatal_errors.c.uuid.in_(uuids)))
