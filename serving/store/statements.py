"""Statements that both databases know, each in its own dialect."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite


def insert_into(db: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that may say what to do on a conflict."""
    postgres = db.dialect.name == "postgresql"
    return postgresql.insert(table) if postgres else sqlite.insert(table)


def upsert(db: Connection, table: Table, row: dict[str, Any]) -> None:
    """Insert a row, or replace the one with its key."""
    statement = insert_into(db, table).values(row)
    changed = {name: statement.excluded[name] for name in row if name not in table.primary_key}
    keys = list(table.primary_key)
    db.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))
