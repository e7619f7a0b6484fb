"""Late labels on their way to the gateways, which know what was answered.

Which gateway answered a request is not known here, so each label goes to every gateway, once more
after a while in case it was lost, until one has joined it or its request is forgotten there. Labels
are taken while a rollout asks for them; of too many the oldest go. Nothing is written to the store.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from serving.core.routing import RouteTable
from serving.errors import ConflictError, InvalidRequest

MAX_ITEMS: Final = 1000
"""Labels in one call, and in one answer to a gateway."""
MAX_PENDING: Final = 100_000
MAX_BYTES: Final = 64 << 20
REPEAT_S: Final = 30.0
_LONGEST_ID: Final = 128
_LONGEST_LABEL: Final = 64
_MOST_LABELS: Final = 1024
# What Python needs for a label beside its id and its values.
_ITEM_BYTES: Final = 450
_POINTER_BYTES: Final = 8


@dataclass(slots=True)
class _Item:
    number: int
    received_at: float
    plain: dict[str, Any]
    nbytes: int


@dataclass(slots=True)
class _Cursor:
    """How far one gateway has come in the current round, which began at `since`.

    It has heard labels up to `twice` twice, so they are not in the next round.
    """

    since: float
    number: int = 0
    twice: int = 0


class Feedback:
    """Labels that no gateway has joined yet, by request id. Lives on the controller's loop."""

    def __init__(self) -> None:
        self._items: dict[str, _Item] = {}
        self._cursors: dict[str, _Cursor] = {}
        self._number = 0
        self._nbytes = 0
        # Labels that made room for later ones.
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, raw: object, now: float, window_s: float) -> int:
        """Take one label or a list of them; how many. A later label of a request replaces it.

        `now` is monotonic, in seconds; `window_s` is how long answers wait for their labels, 0 if
        no rollout asks for any. Raises `InvalidRequest`, and takes none, if one is malformed;
        `ConflictError` if nobody asks.
        """
        rows = raw if isinstance(raw, list) else [raw]
        if not rows or len(rows) > MAX_ITEMS:
            raise InvalidRequest(f"expected 1 to {MAX_ITEMS} labels, found {len(rows)}")
        items = [_checked(row, i) for i, row in enumerate(rows)]
        if not window_s:
            raise ConflictError(
                "no label is waited for: no rollout that runs has `feedback` in its plan"
            )
        self._expire(now, window_s)
        for item in items:
            self._number += 1
            # Behind all others, which keeps the order by number.
            self._remove(item["request_id"])
            self._items[item["request_id"]] = _Item(self._number, now, item, _nbytes(item))
            self._nbytes += _nbytes(item)
        while len(self._items) > MAX_PENDING or self._nbytes > MAX_BYTES:
            self._remove(next(iter(self._items)))
            self.dropped += 1
        return len(items)

    def _remove(self, request_id: str) -> None:
        if item := self._items.pop(request_id, None):
            self._nbytes -= item.nbytes

    def joined(self, request_ids: Iterable[object]) -> None:
        """A gateway has joined these."""
        for request_id in request_ids:
            self._remove(str(request_id))

    def due(self, gateway: str, now: float, window_s: float) -> list[dict[str, Any]]:
        """What to tell a gateway now: what it has not heard, or once only and `REPEAT_S` ago."""
        self._expire(now, window_s)
        cursor = self._cursors.setdefault(gateway, _Cursor(now))
        found = self._after(cursor.number)
        if not found and now - cursor.since >= REPEAT_S:
            again, cursor.twice, cursor.since = cursor.twice, cursor.number, now
            found = self._after(again)
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

    def _expire(self, now: float, window_s: float) -> None:
        old = takewhile(lambda e: now - e[1].received_at >= window_s, self._items.items())
        for request_id, _ in list(old):
            self._remove(request_id)


def answers_kept_s(table: RouteTable) -> float:
    """How long gateways keep answers for their labels; 0 where they keep none."""
    splits = (route.split for route in table.models.values())
    return max((s.feedback["window_s"] for s in splits if s and s.feedback), default=0.0)


def _nbytes(item: Mapping[str, Any]) -> int:
    """About what a label takes in memory."""
    label = item["label"]
    values = label if isinstance(label, list) else [label]
    values_bytes = sum(_POINTER_BYTES + sys.getsizeof(value) for value in values)
    return _ITEM_BYTES + sys.getsizeof(item["request_id"]) + values_bytes


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
            f"{where}: label is the class that the answer should have had, an integer; for an "
            f"answer of several rows a list of them, {_MOST_LABELS} at most"
        )
    return {"request_id": request_id, "label": label}


def _is_label(label: object) -> bool:
    if isinstance(label, list):
        return 0 < len(label) <= _MOST_LABELS and all(_is_class(v) for v in label)
    return _is_class(label)


def _is_class(value: object) -> bool:
    """Whether gateways can take it for a class: what they cannot would count for nothing."""
    if isinstance(value, str):
        return len(value) <= _LONGEST_LABEL and _is_integer(value)
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return isinstance(value, float) and value.is_integer()


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True
