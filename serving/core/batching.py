"""What leaves for a replica next, and how long a newcomer would wait: the batcher's pure half.

Two structures, neither of which knows a clock:

`RequestQueue` holds admitted requests in lanes. A lane is (priority level, shape key): only
requests of one lane may travel together, because only they can be concatenated. The lane whose head
is oldest at the most urgent level leaves first, so a busy shape cannot starve a rare one. Requests
that are sent again after a replica was lost travel alone and first: if one of them is what kills
replicas, it takes no batch-mate with it.

`ServiceModel` predicts the run time of a batch as `a + c · rows`, fitted by exponentially weighted
least squares to observed runs. Admission compares its estimate of the wait with the deadline, so
overload is answered at once instead of by a time-out.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Final, Generic, Protocol, TypeVar

DEFAULT_PRIORITY: Final = 5
LOWEST_PRIORITY: Final = 9
_SPARE_HEADS: Final = 16


class Item(Protocol):
    """What a queue needs to know of a request. It is told apart by identity."""

    rows: int
    key: Hashable
    level: int


T = TypeVar("T", bound=Item)


class _Lane(Generic[T]):
    """Requests of one priority and shape, each with its place in the order of arrival."""

    __slots__ = ("id", "items", "rows")

    def __init__(self, lane_id: tuple[int, Hashable]) -> None:
        self.id = lane_id
        self.items: dict[T, int] = {}
        self.rows = 0

    @property
    def head(self) -> int:
        """The place of the oldest request."""
        return next(iter(self.items.values()))


class RequestQueue(Generic[T]):
    """Requests waiting for a replica.

    An item that is answered or cancelled while it waits is taken out by `forget`: what it holds is
    free at once, however long those before it wait.
    """

    __slots__ = ("_again", "_heads", "_lanes", "_order", "rows")

    def __init__(self) -> None:
        self.rows = 0
        self._order = 0
        self._lanes: dict[tuple[int, Hashable], _Lane[T]] = {}
        # An entry a lane, and some of lanes that are no more: (level, place of its head when it was
        # entered, lane).
        self._heads: list[tuple[int, int, _Lane[T]]] = []
        self._again: dict[T, None] = {}

    def push(self, item: T) -> None:
        """Append a request to its lane."""
        self._order += 1
        lane_id = (item.level, item.key)
        lane = self._lanes.get(lane_id)
        if lane is None:
            lane = self._lanes[lane_id] = _Lane(lane_id)
            heapq.heappush(self._heads, (item.level, self._order, lane))
        lane.items[item] = self._order
        lane.rows += item.rows
        self.rows += item.rows

    def push_again(self, item: T) -> None:
        """Put back a request that was sent in vain: it leaves first, and alone."""
        self._again[item] = None
        self.rows += item.rows

    @property
    def again(self) -> T | None:
        """The request that leaves next because it was put back, if there is one."""
        return next(iter(self._again), None)

    def forget(self, item: T) -> None:
        """Take an item out, if it waits."""
        if item in self._again:
            del self._again[item]
            self.rows -= item.rows
            return
        lane = self._lanes.get((item.level, item.key))
        if lane is None or lane.items.pop(item, None) is None:
            return
        lane.rows -= item.rows
        self.rows -= item.rows
        if not lane.items:
            del self._lanes[lane.id]
            if len(self._heads) > 2 * len(self._lanes) + _SPARE_HEADS:
                self._heads = [entry for entry in self._heads if entry[2].items]
                heapq.heapify(self._heads)

    def ripe(self, max_rows: int, max_items: int) -> bool:
        """Whether some lane could fill a batch, or a request is to be sent again."""
        return bool(self._again) or any(
            lane.rows >= max_rows or len(lane.items) >= max_items for lane in self._lanes.values()
        )

    def take(self, max_rows: int, max_items: int) -> list[T]:
        """Remove and return the next batch: at most `max_rows` rows and `max_items` requests.

        A request that alone has more rows than that leaves alone. Empty when nothing waits.
        """
        if (again := self.again) is not None:
            self.forget(again)
            return [again]
        while self._heads:
            level, place, lane = heapq.heappop(self._heads)
            if not lane.items:
                continue
            if lane.head != place:
                # Its head was forgotten; the next one is younger than other lanes' perhaps.
                heapq.heappush(self._heads, (level, lane.head, lane))
                continue
            batch = self._take_lane(lane, max_rows, max_items)
            if lane.items:
                heapq.heappush(self._heads, (level, lane.head, lane))
            else:
                del self._lanes[lane.id]
            return batch
        return []

    def _take_lane(self, lane: _Lane[T], max_rows: int, max_items: int) -> list[T]:
        batch: list[T] = []
        rows = 0
        for item in lane.items:
            if batch and (rows + item.rows > max_rows or len(batch) >= max_items):
                break
            rows += item.rows
            batch.append(item)
        for item in batch:
            del lane.items[item]
        lane.rows -= rows
        self.rows -= rows
        return batch

    def __iter__(self) -> Iterator[T]:
        """Waiting items in no particular order."""
        yield from self._again
        for lane in self._lanes.values():
            yield from lane.items

    def __bool__(self) -> bool:
        return self.rows > 0


class ServiceModel:
    """Run time of a batch in seconds as a line in its rows, learnt from runs.

    Weighted least squares with weight `decay` per later observation. While all observed runs had
    the same size the line goes through the origin, which overestimates large batches: cautious, and
    mended by the first run of another size.
    """

    __slots__ = ("_decay", "_w", "_x", "_xx", "_xy", "_y")

    def __init__(self, decay: float = 0.95) -> None:
        self._decay = decay
        self._w = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Add one run."""
        d = self._decay
        self._w = self._w * d + 1.0
        self._x = self._x * d + rows
        self._y = self._y * d + seconds
        self._xx = self._xx * d + rows * rows
        self._xy = self._xy * d + rows * seconds

    def predict(self, rows: int) -> float:
        """Expected run time of `rows` rows, in seconds; 0.0 before the first observation."""
        if self._w == 0.0 or rows <= 0:
            return 0.0
        spread = self._w * self._xx - self._x * self._x
        if spread <= 1e-9 * self._w * self._xx:
            return rows * self._y / self._x
        slope = max(0.0, (self._w * self._xy - self._x * self._y) / spread)
        base = max(0.0, (self._y - slope * self._x) / self._w)
        return base + slope * rows

    def drain(self, rows: int, max_rows: int) -> float:
        """Expected time to run `rows` queued rows in batches of at most `max_rows`, in seconds."""
        full, rest = divmod(rows, max_rows)
        return full * self.predict(max_rows) + self.predict(rest)
