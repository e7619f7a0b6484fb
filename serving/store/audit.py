"""The audit log: who did what when, as a chain of hashes that shows any later change.

Each entry's hash covers its own fields and the hash of the entry before it. Whoever changes, takes
out or slips in an entry has to make every later hash anew, and those were seen by others: in a
reply, in an export, in `Head.sentence`. A chain alone does not show that its end was cut off, so
the number and the hash of the last entry are kept beside it, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import Connection, delete, insert, select

from serving.errors import ConfigError, StoreError
from serving.store.schema import audit, audit_head

FIRST_HASH: Final = "0" * 64
"""What the first entry follows."""
_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What is to be written down. `at` is Unix seconds, `subject` a rollout, model or GPU."""

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


@dataclass(frozen=True, slots=True)
class Head:
    """Where a log ends: the number of its last entry, 0 for none, and that one's hash."""

    count: int
    hash: str

    def __str__(self) -> str:
        return f"{self.hash}@{self.count}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read `str`'s form. Raises `ConfigError`."""
        found = re.fullmatch(r"([0-9a-f]{64})@([1-9][0-9]{0,17})", text)
        if found is None:
            raise ConfigError(
                f"{text!r} is no end of a log; allowed: HASH@COUNT, as `serving audit verify` "
                "printed it"
            )
        return cls(int(found[2]), found[1])

    @property
    def sentence(self) -> str:
        """What `verify` found out about a log that is intact and ends here."""
        if not self.count:
            return "the audit log is empty"
        entries = "1 entry" if self.count == 1 else f"{self.count} entries"
        return f"{entries}, as written; note the end of the log elsewhere, to check it by: {self}"


EMPTY: Final = Head(0, FIRST_HASH)


def entry_hash(seq: int, entry: AuditEntry, prev_hash: str) -> str:
    """SHA-256 over the canonical JSON of an entry and of the hash before it."""
    fields = [seq, entry.at, entry.actor, entry.action, entry.subject, entry.body, prev_hash]
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def append(db: Connection, entries: Sequence[AuditEntry]) -> None:
    """Add entries at the end. The transaction must hold the write lock. Raises `StoreError`."""
    if not entries:
        return
    # After a log that was cut off it goes on where it ended: the gap stays to be seen.
    end = max(head(db) or EMPTY, _last(db), key=lambda at: at.count)
    seq, prev_hash = end.count, end.hash
    for entry in entries:
        # As it will be read: what JSON changes must not look like a forgery.
        entry = AuditEntry(**{**asdict(entry), "at": float(entry.at), "body": _plain(entry.body)})
        seq += 1
        row = {**asdict(entry), "prev_hash": prev_hash, "hash": entry_hash(seq, entry, prev_hash)}
        db.execute(insert(audit).values(seq=seq, **row))
        prev_hash = row["hash"]
    db.execute(delete(audit_head))
    db.execute(insert(audit_head).values(id=1, seq=seq, hash=prev_hash))


def head(db: Connection) -> Head | None:
    """Where the log ends by its own record; None where nothing was ever written."""
    row = db.execute(select(audit_head.c.seq, audit_head.c.hash)).one_or_none()
    return None if row is None else Head(*row)


def _last(db: Connection) -> Head:
    last = db.execute(select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1))
    return Head(*(last.one_or_none() or (0, FIRST_HASH)))


def verify(rows: Iterable[AuditRow], ends: Sequence[Head]) -> Head:
    """Where a log ends that is intact; `rows` are all entries in order.

    `ends` are where it ended once: it must still have each of them. Raises `StoreError` that names
    the first entry that is not as it was written.
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
        if any(end.count == row.seq and end.hash != row.hash for end in ends):
            raise StoreError(
                f"audit log: entry {row.seq} has not the hash that was noted when the log ended "
                "there: the log or the note was written anew"
            )
        prev_hash = row.hash
    if missing := [end.count for end in ends if end.count > count]:
        raise StoreError(
            f"audit log: it ends with entry {count}, but once had {max(missing)}: its end was cut "
            "off"
        )
    return Head(count, prev_hash)


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
