"""The tables of the control store. The migrations build them; a test compares the two.

Times are Unix seconds (UTC). JSON columns hold objects that their writers understand and the store
does not read.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)

metadata: Final = MetaData()

# SQLite numbers rows by itself only where the key's type is exactly INTEGER.
_Id: Final = BigInteger().with_variant(Integer(), "sqlite")

pins: Final = Table(
    "pins",
    metadata,
    Column("model", Text, nullable=False),
    Column("ref", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("resolved_at", Double, nullable=False),
    PrimaryKeyConstraint("model", "ref"),
)

# Every version that was ever applied, and the digest that it had: never changed, never removed.
versions: Final = Table(
    "versions",
    metadata,
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("first_applied_at", Double, nullable=False),
    PrimaryKeyConstraint("model", "version"),
)

# One row each: what was asked for, and what gateways were told.
desired: Final = Table(
    "desired",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    Column("config", JSON, nullable=False),
    Column("updated_at", Double, nullable=False),
)

route_table: Final = Table(
    "route_table",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    Column("body", JSON, nullable=False),
    Column("updated_at", Double, nullable=False),
)

counters: Final = Table(
    "counters",
    metadata,
    Column("instance", Text, primary_key=True),
    Column("body", JSON, nullable=False),
    Column("updated_at", Double, nullable=False),
)

# Append-only. AUTOINCREMENT: an id is never given twice, whatever happens to the last row.
events: Final = Table(
    "events",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body", JSON, nullable=False),
    sqlite_autoincrement=True,
)

# Every rollout that ever was; `finished_at` is empty while ticks can still change it.
rollouts: Final = Table(
    "rollouts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("model", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("body", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("finished_at", Double, nullable=True),
)

# Append-only, without gaps; `hash` covers the row and the hash of the one before it.
audit: Final = Table(
    "audit",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("body", JSON, nullable=False),
    Column("prev_hash", Text, nullable=False),
    Column("hash", Text, nullable=False),
)
