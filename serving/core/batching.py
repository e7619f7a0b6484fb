"""What leaves for a replica next, and how long a newcomer would wait: the batcher's pure half.

Two structures, neither of which knows a clock:

`RequestQueue` holds admitted requests in lanes. A lane is (priority level, shape key): only
requests of one lane may travel together, because only they can be concatenated. The lane whose head
is oldest at the most urgent level leaves first, so a busy shape cannot starve a rare one. A request
whose batch failed is run again before them, in a batch of its own. Requests whose replica was lost
are suspects, any of which may be what killed it: they wait apart, in the groups that
`suspect_groups` makes, for a replica that is kept for them.

`ServiceModel` predicts the run time of a batch as `a + c · rows`, fitted by exponentially weighted
least squares to observed runs. Admission compares its estimate of the wait with the deadline, so
overload is answered at once instead of by a time-out.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

DEFAULT_PRIORITY: Final = 5
LOWEST_PRIORITY: Final = 9
# Of copies that no client waits for: they leave after every client's request.
SHADOW_LEVEL: Final = LOWEST_PRIORITY + 1
_SPARE_HEADS: Final = 16
_FEW_SUSPECTS: Final = 8


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

    __slots__ = (
        "_groups",
        "_heads",
        "_lanes",
        "_order",
        "_reruns",
        "_suspects",
        "rerun_rows",
        "rows",
        "suspect_rows",
    )

    def __init__(self) -> None:
        # Of everything that waits, and of its two special kinds.
        self.rows = 0
        self.rerun_rows = 0
        self.suspect_rows = 0
        self._order = 0
        self._lanes: dict[tuple[int, Hashable], _Lane[T]] = {}
        # An entry a lane, and some of lanes that are no more: (level, place of its head when it was
        # entered, lane).
        self._heads: list[tuple[int, int, _Lane[T]]] = []
        self._reruns: dict[T, None] = {}
        # Suspects with the number of their group, group after group, and the groups' sizes.
        self._suspects: dict[T, int] = {}
        self._groups: Counter[int] = Counter()

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

    def push_rerun(self, item: T) -> None:
        """Put back a request whose batch failed: it leaves first, and alone."""
        self._reruns[item] = None
        self.rerun_rows += item.rows
        self.rows += item.rows

    def push_suspects(self, group: Sequence[T]) -> None:
        """Put back requests of one batch whose replica was lost: `take_suspects` gives them."""
        self._order += 1
        for item in group:
            self._suspects[item] = self._order
            self._groups[self._order] += 1
            self.suspect_rows += item.rows
            self.rows += item.rows

    @property
    def singular_runs(self) -> int:
        """How many runs those that were put back take: one each, or one a group of suspects."""
        return len(self._reruns) + len(self._groups)

    def forget(self, item: T) -> None:
        """Take an item out, if it waits."""
        if item in self._reruns:
            del self._reruns[item]
            self.rerun_rows -= item.rows
            self.rows -= item.rows
            return
        if item in self._suspects:
            self._remove_suspect(item)
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
        """Whether some lane could fill a batch, or a request is to be run again."""
        return bool(self._reruns) or any(
            lane.rows >= max_rows or len(lane.items) >= max_items for lane in self._lanes.values()
        )

    def take(self, max_rows: int, max_items: int) -> list[T]:
        """Remove and return the next batch: at most `max_rows` rows and `max_items` requests.

        A request that alone has more rows than that leaves alone. Suspects are not given. Empty
        when nothing else waits.
        """
        if self._reruns:
            again = next(iter(self._reruns))
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

    def take_suspects(self, max_rows: int, max_items: int) -> list[T]:
        """Remove and return the first group of suspects, or as much as a batch may have of it."""
        taken: list[T] = []
        rows = first = 0
        for item, group in self._suspects.items():
            if taken and (group != first or rows + item.rows > max_rows or len(taken) >= max_items):
                break
            first = group
            rows += item.rows
            taken.append(item)
        for item in taken:
            self._remove_suspect(item)
        return taken

    def _remove_suspect(self, item: T) -> None:
        group = self._suspects.pop(item)
        self._groups[group] -= 1
        if not self._groups[group]:
            del self._groups[group]
        self.suspect_rows -= item.rows
        self.rows -= item.rows

    def __iter__(self) -> Iterator[T]:
        """Waiting items in no particular order."""
        yield from self._reruns
        yield from self._suspects
        for lane in self._lanes.values():
            yield from lane.items

    def __len__(self) -> int:
        lanes = sum(len(lane.items) for lane in self._lanes.values())
        return lanes + len(self._reruns) + len(self._suspects)

    def __bool__(self) -> bool:
        return self.rows > 0


def suspect_groups(batch: Sequence[T], lost: int, *, again: bool) -> Iterator[Sequence[T]]:
    """How the requests of a lost batch are sent again; `lost` requests were at that replica.

    One of them may be what killed it. Sent one by one it would kill one more replica, but the many
    innocent would wait for a run each. So where there are more than a few they are sent in groups
    of about the square root of their number, and only the members of a group that is lost `again`
    one by one: a request that kills every replica it meets kills three in all, two where few were
    lost.
    """
    size = 1 if again or lost <= _FEW_SUSPECTS else math.isqrt(lost - 1) + 1
    for start in range(0, len(batch), size):
        yield batch[start : start + size]


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

    def predict(self, rows: int, runs: int = 1) -> float:
        """Expected time of `runs` runs of together `rows` rows, one after the other, in seconds.

        0.0 before the first observation.
        """
        if self._w == 0.0 or rows <= 0:
            return 0.0
        spread = self._w * self._xx - self._x * self._x
        if spread <= 1e-9 * self._w * self._xx:
            return rows * self._y / self._x
        slope = max(0.0, (self._w * self._xy - self._x * self._y) / spread)
        base = max(0.0, (self._y - slope * self._x) / self._w)
        return base * runs + slope * rows

    def drain(self, rows: int, max_rows: int) -> float:
        """Expected time to run `rows` queued rows in batches of at most `max_rows`, in seconds."""
        return self.predict(rows, -(-rows // max_rows))
