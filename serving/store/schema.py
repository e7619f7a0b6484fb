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

# One row: the number and the hash of the last entry. A log that was cut off does not end there.
audit_head: Final = Table(
    "audit_head",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
)

# GPUs on which nothing new is to start, by UUID.
gpu_cordons: Final = Table(
    "gpu_cordons",
    metadata,
    Column("uuid", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("at", Double, nullable=False),
)

# Replicas that a fatal error of a GPU has ended within the last hour.
gpu_fatal_errors: Final = Table(
    "gpu_fatal_errors",
    metadata,
    Column("uuid", Text, nullable=False),
    Column("replica", Text, nullable=False),
    Column("at", Double, nullable=False),
    PrimaryKeyConstraint("uuid", "replica"),
)

# What a bundle was measured to take; `ceiling` is the most rows that were seen to fit into
# `lease_bytes`, if any.
memory_profiles: Final = Table(
    "memory_profiles",
    metadata,
    Column("digest", Text, nullable=False),
    Column("device_type", Text, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("profile", JSON, nullable=False),
    Column("ceiling", Integer, nullable=True),
    Column("lease_bytes", BigInteger, nullable=False),
    PrimaryKeyConstraint("digest", "device_type", "runtime"),
)

# What everything cost, by the minute: Unix seconds of its begin, 0 for all that is older than what
# is kept. Times are nanoseconds of a device, energy is in millijoules, empty where not measured.
ledger: Final = Table(
    "ledger",
    metadata,
    Column("minute", BigInteger, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("nano_usd", BigInteger, nullable=False),
    Column("ns", BigInteger, nullable=False),
    Column("unpriced_ns", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("energy_mj", BigInteger, nullable=True),
    PrimaryKeyConstraint("minute", "tenant", "model", "version", "device", "kind"),
)

# How far each lease and each device is settled; written with the rows that this made.
ledger_cursors: Final = Table(
    "ledger_cursors",
    metadata,
    Column("id", Text, primary_key=True),
    Column("body", JSON, nullable=False),
    Column("updated_at", Double, nullable=False),
)

# One row: how often the ledger was written.
ledger_head: Final = Table(
    "ledger_head",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
)
