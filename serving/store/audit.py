"""The audit log: who did what when, as a chain of hashes that shows any later change.

Each entry's hash covers its own fields and the hash of the entry before it. Whoever changes, takes
out or slips in an entry has to make every later hash anew, and those were seen by others: in a
reply, in an export, in `verify`'s sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import Connection, insert, select

from serving.errors import StoreError
from serving.store.schema import audit

FIRST_HASH: Final = "0" * 64
"""What the first entry follows."""
_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What is to be written down. `at` is Unix seconds, `subject` a rollout or a model."""

    at: float
    actor: str
    action: str
    subject: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One entry of the log, as it lies in the store. `seq` counts from 1 without gaps."""

    seq: int
    at: float
    actor: str
    action: str
    subject: str
    body: Mapping[str, Any]
    prev_hash: str
    hash: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "body": dict(self.body)}


def entry_hash(seq: int, entry: AuditEntry, prev_hash: str) -> str:
    """SHA-256 over the canonical JSON of an entry and of the hash before it."""
    fields = [seq, entry.at, entry.actor, entry.action, entry.subject, entry.body, prev_hash]
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def append(db: Connection, entries: Sequence[AuditEntry]) -> None:
    """Add entries at the end. The transaction must hold the write lock. Raises `StoreError`."""
    if not entries:
        return
    last = db.execute(select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1))
    seq, prev_hash = last.one_or_none() or (0, FIRST_HASH)
    for entry in entries:
        # As it will be read: what JSON changes must not look like a forgery.
        entry = AuditEntry(**{**asdict(entry), "at": float(entry.at), "body": _plain(entry.body)})
        seq += 1
        row = {**asdict(entry), "prev_hash": prev_hash, "hash": entry_hash(seq, entry, prev_hash)}
        db.execute(insert(audit).values(seq=seq, **row))
        prev_hash = row["hash"]


def verify(rows: Iterable[AuditRow]) -> str:
    """A sentence about a whole log that is intact; `rows` are all entries in order.

    Raises `StoreError` that names the first entry that is not as it was written.
    """
    count, prev_hash = 0, FIRST_HASH
    for row in rows:
        count += 1
        if row.seq != count:
            raise StoreError(f"audit log: entry {count} is missing; entry {row.seq} comes instead")
        if row.prev_hash != prev_hash:
            raise StoreError(f"audit log: entry {row.seq} does not follow entry {row.seq - 1}")
        entry = AuditEntry(row.at, row.actor, row.action, row.subject, row.body)
        if row.hash != entry_hash(row.seq, entry, prev_hash):
            raise StoreError(f"audit log: entry {row.seq} was changed after it was written")
        prev_hash = row.hash
    if not count:
        return "the audit log is empty"
    entries = "1 entry" if count == 1 else f"{count} entries"
    return f"{entries}, as written; the hash of the last one is {prev_hash}"


def read(db: Connection, *, after: int | None, limit: int, subject: str | None) -> list[AuditRow]:
    """At most `limit` entries, oldest first: those after `after`, or else the last ones."""
    query = select(audit)
    if subject is not None:
        query = query.where(audit.c.subject == subject)
    if after is None:
        found = db.execute(query.order_by(audit.c.seq.desc()).limit(limit)).mappings().all()
        return [AuditRow(**row) for row in reversed(found)]
    query = query.where(audit.c.seq > after).order_by(audit.c.seq).limit(limit)
    return [AuditRow(**row) for row in db.execute(query).mappings()]


def pages(read_page: Callable[[int, int], Sequence[AuditRow]]) -> Iterator[AuditRow]:
    """Every entry; `read_page(after, limit)` reads some."""
    after = 0
    while page := read_page(after, _PAGE):
        yield from page
        after = page[-1].seq


def _plain(body: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"what is to be audited is not JSON: {error}") from error
    return plain
