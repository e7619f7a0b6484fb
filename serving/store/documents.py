"""What was asked for and what gateways were told: one document each, with a revision.

On a connection and within a transaction of the store's.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, select

from serving.errors import ConflictError
from serving.store.schema import desired, route_table
from serving.store.statements import upsert


def read_desired(db: Connection) -> dict[str, Any] | None:
    """What was asked for last, or None."""
    return db.execute(select(desired.c.config)).scalar_one_or_none()


def desired_revision(db: Connection) -> int:
    """How often it was saved."""
    return _revision(db, desired)


def save_desired(
    db: Connection, config: dict[str, Any], *, expected: int | None, at: float
) -> None:
    """Replace what was asked for; its revision becomes one more.

    Raises `ConflictError` if `expected` is given and is not its revision.
    """
    revision = desired_revision(db)
    if expected is not None and expected != revision:
        raise ConflictError(
            f"the configuration is at revision {revision}, not {expected}: "
            "someone else changed it; look at it again and repeat"
        )
    row = {"id": 1, "revision": revision + 1, "config": config, "updated_at": at}
    upsert(db, desired, row)


def read_route_table(db: Connection) -> dict[str, Any] | None:
    """The table that was last saved, or None."""
    return db.execute(select(route_table.c.body)).scalar_one_or_none()


def route_table_revision(db: Connection) -> int:
    """The saved table's revision; 0 without one."""
    return _revision(db, route_table)


def save_route_table(db: Connection, table: dict[str, Any], *, at: float) -> None:
    """Replace the route table.

    Raises `ConflictError` if `table["revision"]` is not above the saved one's.
    """
    revision = int(table["revision"])
    if revision <= (saved := route_table_revision(db)):
        raise ConflictError(
            f"route table revision {revision} is not above the saved revision {saved}: "
            "another controller writes to this store"
        )
    row = {"id": 1, "revision": revision, "body": table, "updated_at": at}
    upsert(db, route_table, row)


def _revision(db: Connection, table: Table) -> int:
    """The revision in a one-row table; 0 without a row."""
    return db.execute(select(table.c.revision)).scalar_one_or_none() or 0
