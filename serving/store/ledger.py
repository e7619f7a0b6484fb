"""The ledger's rows and cursors, on a connection and within a transaction of the store's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, case, delete, func, insert, select

from serving.errors import ConflictError
from serving.store.schema import ledger, ledger_cursors, ledger_head
from serving.store.statements import insert_into, upsert

_ACCOUNT = ("tenant", "model", "version", "device", "kind")
_SUMS = ("nano_usd", "ns", "unpriced_ns", "requests")


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """What one account came to within a minute (Unix seconds of its begin; 0: all before).

    `ns` and `unpriced_ns` are nanoseconds of a device, `energy_mj` millijoules, None if unknown.
    """

    minute: int
    tenant: str
    model: str
    version: str
    device: str
    kind: str
    nano_usd: int
    ns: int
    unpriced_ns: int
    requests: int
    energy_mj: int | None = None


def post(
    db: Connection,
    rows: Sequence[LedgerRow],
    cursors: Mapping[str, Mapping[str, Any]],
    dropped: Sequence[str],
    *,
    expected: int,
    at: float,
) -> None:
    """Add rows to those that are there, replace `cursors`, and drop some.

    Raises `ConflictError` if the ledger's revision is not `expected`; it becomes one more.
    """
    if (found := revision(db)) != expected:
        raise ConflictError(
            f"the ledger is at revision {found}, not {expected}: another controller writes to this "
            "store"
        )
    for row in rows:
        _add(db, asdict(row))
    for name, body in cursors.items():
        upsert(db, ledger_cursors, {"id": name, "body": dict(body), "updated_at": at})
    if dropped:
        db.execute(delete(ledger_cursors).where(ledger_cursors.c.id.in_(dropped)))
    upsert(db, ledger_head, {"id": 1, "revision": expected + 1})


def revision(db: Connection) -> int:
    """How often the ledger was written."""
    return db.execute(select(ledger_head.c.revision)).scalar_one_or_none() or 0


def cursors(db: Connection) -> dict[str, dict[str, Any]]:
    """Every cursor by its id."""
    return {row.id: row.body for row in db.execute(select(ledger_cursors))}


def sums(db: Connection, since: int | None) -> list[LedgerRow]:
    """The sum of each account over the minutes from `since` (Unix seconds), or over all.

    Their `minute` is the first that there is, of those that are not summed up.
    """
    columns = [ledger.c[name] for name in _ACCOUNT]
    totals = [func.sum(ledger.c[name]).label(name) for name in (*_SUMS, "energy_mj")]
    first = func.coalesce(func.min(case((ledger.c.minute > 0, ledger.c.minute))), 0)
    query = select(first.label("minute"), *columns, *totals).group_by(*columns).order_by(*columns)
    if since is not None:
        query = query.where(ledger.c.minute >= since)
    found = []
    for row in db.execute(query).mappings():
        # PostgreSQL sums BIGINT as NUMERIC.
        energy = row["energy_mj"]
        numbers = {name: int(row[name]) for name in ("minute", *_SUMS)}
        found.append(
            LedgerRow(
                **{**row, **numbers, "energy_mj": None if energy is None else int(energy)},
            )
        )
    return found


def fold(db: Connection, before: int) -> None:
    """Sum up the minutes before `before` (Unix seconds) in one row an account."""
    columns = [ledger.c[name] for name in _ACCOUNT]
    totals = [func.sum(ledger.c[name]).label(name) for name in (*_SUMS, "energy_mj")]
    old = select(*columns, *totals).where(ledger.c.minute < before).group_by(*columns)
    rows = [dict(row) for row in db.execute(old).mappings()]
    db.execute(delete(ledger).where(ledger.c.minute < before))
    if rows:
        db.execute(insert(ledger), [{"minute": 0, **row} for row in rows])


def _add(db: Connection, row: dict[str, Any]) -> None:
    statement = insert_into(db, ledger).values(row)
    new = statement.excluded
    changed: dict[str, Any] = {name: ledger.c[name] + new[name] for name in _SUMS}
    changed["energy_mj"] = case(
        (new.energy_mj.is_(None), ledger.c.energy_mj),
        else_=func.coalesce(ledger.c.energy_mj, 0) + new.energy_mj,
    )
    keys = list(ledger.primary_key)
    db.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))
