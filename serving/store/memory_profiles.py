"""What bundles were measured to take, on a connection and within a transaction of the store's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, select

from serving.store.schema import memory_profiles
from serving.store.statements import upsert


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """What the bundle `digest` was measured to take: `MemoryProfile.to_dict`; a learned ceiling.

    The ceiling was learned within `lease_bytes`; 0 where that was not written down.
    """

    digest: str
    device_type: str
    runtime: str
    profile: dict[str, Any]
    ceiling: int | None = None
    lease_bytes: int = 0


def read(db: Connection) -> list[ProfileRow]:
    """What every bundle was measured to take."""
    return [ProfileRow(**row) for row in db.execute(select(memory_profiles)).mappings()]


def save(db: Connection, rows: Sequence[ProfileRow]) -> None:
    """Add profiles, or replace those of the same bundle, type of device and runtime."""
    for row in rows:
        upsert(db, memory_profiles, asdict(row))
