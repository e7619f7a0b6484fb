"""Late labels on their way to the gateways, which know what was answered.

Which gateway answered a request is not known here, so each label goes to every gateway, again after
a while, until one has joined it or it is too old. Nothing is written to the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from serving.errors import InvalidRequest, Overloaded

MAX_ITEMS: Final = 1000
"""Labels in one call, and in one answer to a gateway."""
MAX_PENDING: Final = 100_000
MAX_AGE_S: Final = 86_400.0
REPEAT_S: Final = 30.0
_LONGEST_ID: Final = 256
_LONGEST_LABEL: Final = 1024


@dataclass(slots=True)
class _Item:
    number: int
    received_at: float
    plain: dict[str, Any]


@dataclass(slots=True)
class _Cursor:
    """How far one gateway has come in the current round, which began at `since`."""

    number: int = 0
    since: float = -math.inf


class Feedback:
    """Labels that no gateway has joined yet, by request id. Lives on the controller's loop."""

    def __init__(self) -> None:
        self._items: dict[str, _Item] = {}
        self._cursors: dict[str, _Cursor] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, raw: object, now: float) -> int:
        """Take one label or a list of them; how many. A later label of a request replaces it.

        `now` is monotonic, in seconds. Raises `InvalidRequest`, and takes none, if one is
        malformed; `Overloaded` if too many wait already.
        """
        rows = raw if isinstance(raw, list) else [raw]
        if not rows or len(rows) > MAX_ITEMS:
            raise InvalidRequest(f"expected 1 to {MAX_ITEMS} labels, found {len(rows)}")
        items = [_checked(row, i) for i, row in enumerate(rows)]
        self._expire(now)
        if len(self._items) + len(items) > MAX_PENDING:
            raise Overloaded(
                f"{len(self._items)} labels wait for their requests, at most {MAX_PENDING} may",
                retry_after_s=REPEAT_S,
            )
        for item in items:
            self._number += 1
            # Behind all others, which keeps the order by number.
            self._items.pop(item["request_id"], None)
            self._items[item["request_id"]] = _Item(self._number, now, item)
        return len(items)

    def joined(self, request_ids: Iterable[object]) -> None:
        """A gateway has joined these."""
        for request_id in request_ids:
            self._items.pop(str(request_id), None)

    def due(self, gateway: str, now: float) -> list[dict[str, Any]]:
        """What to tell a gateway now: what it has not heard yet, or not for `REPEAT_S`."""
        self._expire(now)
        cursor = self._cursors.setdefault(gateway, _Cursor())
        found = self._after(cursor.number)
        if not found and now - cursor.since >= REPEAT_S:
            cursor.number, cursor.since = 0, now
            found = self._after(0)
        if found:
            cursor.number = found[-1].number
        return [item.plain for item in found]

    def keep(self, gateways: Iterable[str]) -> None:
        """Forget gateways that are gone."""
        alive = set(gateways)
        self._cursors = {g: c for g, c in self._cursors.items() if g in alive}

    def _after(self, number: int) -> list[_Item]:
        if number >= self._number:
            return []
        found = []
        for item in self._items.values():
            if item.number > number:
                found.append(item)
                if len(found) == MAX_ITEMS:
                    break
        return found

    def _expire(self, now: float) -> None:
        old = takewhile(lambda e: now - e[1].received_at > MAX_AGE_S, self._items.items())
        for request_id, _ in list(old):
            del self._items[request_id]


def _checked(row: object, position: int) -> dict[str, Any]:
    where = f"label {position}"
    if not isinstance(row, Mapping):
        raise InvalidRequest(f'{where}: expected {{"request_id": …, "label": …}}')
    if unknown := sorted(row.keys() - {"request_id", "label"}):
        raise InvalidRequest(f"{where}: unknown key {unknown[0]!r}; allowed: label, request_id")
    request_id, label = row.get("request_id"), row.get("label")
    if not isinstance(request_id, str) or not 0 < len(request_id) <= _LONGEST_ID:
        raise InvalidRequest(
            f"{where}: request_id is the x-request-id of an answer, 1 to {_LONGEST_ID} characters"
        )
    if not _is_label(label):
        raise InvalidRequest(
            f"{where}: label is a string, a finite number, true or false, "
            f"or a list of at most {_LONGEST_LABEL} of them"
        )
    return {"request_id": request_id, "label": label}


def _is_label(label: object) -> bool:
    if isinstance(label, list):
        return 0 < len(label) <= _LONGEST_LABEL and all(_is_scalar(v) for v in label)
    return _is_scalar(label)


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_LABEL
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
