"""Cordons of GPUs, on a connection and within a transaction of the store's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, select

from serving.store.schema import gpu_cordons
from serving.store.statements import upsert


@dataclass(frozen=True, slots=True)
class CordonRow:
    """A GPU on which nothing new is to start, who said so and why. `at` is Unix seconds."""

    uuid: str
    reason: str
    actor: str
    at: float


def read(db: Connection) -> list[CordonRow]:
    """Every GPU that is cordoned, by UUID."""
    rows = db.execute(select(gpu_cordons).order_by(gpu_cordons.c.uuid))
    return [CordonRow(**row) for row in rows.mappings()]


def save(db: Connection, rows: Sequence[CordonRow], lifted: Sequence[str]) -> None:
    """Add or replace cordons, and lift those of the UUIDs `lifted`."""
    for row in rows:
        upsert(db, gpu_cordons, asdict(row))
    db.execute(delete(gpu_cordons).where(gpu_cordons.c.uuid.in_(lifted)))
