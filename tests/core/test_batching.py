from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from serving.core.batching import RequestQueue, ServiceModel, suspect_groups


@dataclass(eq=False)
class Item:
    rows: int = 1
    key: Hashable = ()
    level: int = 5


@dataclass
class Model:
    """What a queue should hold: lanes in order of arrival, what is run again, and suspects."""

    lanes: dict[tuple[int, Hashable], list[Item]] = field(default_factory=dict)
    arrival: dict[Item, int] = field(default_factory=dict)
    reruns: list[Item] = field(default_factory=list)
    groups: list[list[Item]] = field(default_factory=list)

    def __iter__(self):
        yield from self.reruns
        for group in self.groups:
            yield from group
        for lane in self.lanes.values():
            yield from lane

    def expected_batch(self, max_rows: int, max_items: int) -> list[Item]:
        if self.reruns:
            return [self.reruns[0]]
        lanes = [lane for lane in self.lanes.values() if lane]
        if not lanes:
            return []
        lane = min(lanes, key=lambda lane: (lane[0].level, self.arrival[lane[0]]))
        return fitting(lane, max_rows, max_items)

    def remove(self, item: Item) -> None:
        if item in self.reruns:
            self.reruns.remove(item)
            return
        for group in self.groups:
            if item in group:
                group.remove(item)
                self.groups = [g for g in self.groups if g]
                return
        self.lanes[item.level, item.key].remove(item)


def fitting(items: list[Item], max_rows: int, max_items: int) -> list[Item]:
    """The first of these, as many as make a batch."""
    batch: list[Item] = []
    for item in items:
        full = sum(i.rows for i in batch) + item.rows > max_rows or len(batch) >= max_items
        if batch and full:
            break
        batch.append(item)
    return batch


class QueueMachine(RuleBasedStateMachine):
    """A queue against its model, through every order of what a batcher does to it."""

    waiting: Bundle[Item] = Bundle("waiting")
    taken: Bundle[Item] = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.queue: RequestQueue[Item] = RequestQueue()
        self.model = Model()
        self.pushed = 0

    @rule(
        target=waiting,
        rows=st.integers(1, 6),
        key=st.sampled_from(["a", "b", "c"]),
        level=st.integers(1, 3),
    )
    def push(self, rows: int, key: str, level: int) -> Item:
        item = Item(rows, key, level)
        self.pushed += 1
        self.queue.push(item)
        self.model.lanes.setdefault((level, key), []).append(item)
        self.model.arrival[item] = self.pushed
        return item

    @rule(target=waiting, item=consumes(taken))
    def push_rerun(self, item: Item) -> Item:
        self.queue.push_rerun(item)
        self.model.reruns.append(item)
        return item

    @rule(target=waiting, group=st.lists(consumes(taken), min_size=1, max_size=4))
    def push_suspects(self, group: list[Item]):
        self.queue.push_suspects(group)
        self.model.groups.append(list(group))
        return multiple(*group)

    @rule(target=taken, max_rows=st.integers(1, 8), max_items=st.integers(1, 4))
    def take_suspects(self, max_rows: int, max_items: int):
        groups = self.model.groups
        expected = fitting(groups[0], max_rows, max_items) if groups else []
        batch = self.queue.take_suspects(max_rows, max_items)
        assert batch == expected
        for item in batch:
            self.model.remove(item)
        return multiple(*batch)

    @rule(item=consumes(waiting))
    def forget(self, item: Item) -> None:
        """What is answered while it waits; or what left long ago, which changes nothing."""
        self.queue.forget(item)
        if item in list(self.model):
            self.model.remove(item)

    @rule(target=taken, max_rows=st.integers(1, 8), max_items=st.integers(1, 4))
    def take(self, max_rows: int, max_items: int):
        expected = self.model.expected_batch(max_rows, max_items)
        batch = self.queue.take(max_rows, max_items)
        assert batch == expected
        assert len({(item.level, item.key) for item in batch}) <= 1
        assert len(batch) == 1 or sum(item.rows for item in batch) <= max_rows
        for item in batch:
            self.model.remove(item)
        return multiple(*batch)

    @rule(max_rows=st.integers(1, 8), max_items=st.integers(1, 4))
    def ripe(self, max_rows: int, max_items: int) -> None:
        full = any(
            sum(i.rows for i in lane) >= max_rows or len(lane) >= max_items
            for lane in self.model.lanes.values()
        )
        assert self.queue.ripe(max_rows, max_items) is (bool(self.model.reruns) or full)

    @invariant()
    def holds_what_it_should(self) -> None:
        held = list(self.queue)
        assert len(held) == len(set(held))
        assert set(held) == set(self.model)
        assert self.queue.rows == sum(item.rows for item in held)
        assert self.queue.rerun_rows == sum(item.rows for item in self.model.reruns)
        assert self.queue.suspect_rows == sum(i.rows for g in self.model.groups for i in g)
        assert self.queue.singular_runs == len(self.model.reruns) + len(self.model.groups)
        assert bool(self.queue) is bool(held)

    @invariant()
    def forgotten_lanes_do_not_pile_up(self) -> None:
        assert len(self.queue._lanes) <= len(list(self.queue))
        assert len(self.queue._heads) <= 2 * len(self.queue._lanes) + 17

    def teardown(self) -> None:
        """Everything left leaves in the end, once."""
        left = set(self.queue)
        seen: list[Item] = []
        while batch := self.queue.take(4, 4) or self.queue.take_suspects(4, 4):
            seen += batch
        assert set(seen) == left
        assert len(seen) == len(left)
        assert self.queue.rows == 0
        assert self.queue._heads == []


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def queue_of(*items: Item) -> RequestQueue[Item]:
    queue: RequestQueue[Item] = RequestQueue()
    for item in items:
        queue.push(item)
    return queue


def test_the_oldest_head_of_the_most_urgent_level_leaves_first() -> None:
    late, urgent, early = Item(key="b"), Item(key="a", level=1), Item(key="c")
    queue = queue_of(early, late, urgent)
    assert [queue.take(8, 8) for _ in range(4)] == [[urgent], [early], [late], []]


def test_a_busy_lane_does_not_starve_a_rare_one() -> None:
    busy = [Item(key="busy") for _ in range(6)]
    rare = Item(key="rare")
    queue = queue_of(*busy[:3], rare, *busy[3:])
    assert [queue.take(2, 8) for _ in range(4)] == [busy[:2], [busy[2], busy[3]], [rare], busy[4:]]


def test_a_lane_whose_head_was_forgotten_has_the_place_of_the_next() -> None:
    gone, older, younger = Item(key="a"), Item(key="b"), Item(key="a")
    queue = queue_of(gone, older, younger)
    queue.forget(gone)
    assert [queue.take(8, 8), queue.take(8, 8)] == [[older], [younger]]


def test_a_request_larger_than_a_batch_leaves_alone() -> None:
    large, small = Item(rows=9), Item()
    queue = queue_of(large, small)
    assert [queue.take(4, 8), queue.take(4, 8)] == [[large], [small]]


def test_what_is_run_again_leaves_first_and_alone() -> None:
    first, second, urgent = Item(), Item(), Item(level=1)
    queue = queue_of(first, second)
    assert queue.take(8, 8) == [first, second]
    queue.push(urgent)
    queue.push_rerun(first)
    queue.push_rerun(second)
    assert [queue.take(8, 8) for _ in range(3)] == [[first], [second], [urgent]]


def test_suspects_leave_apart_from_all_others() -> None:
    items = [Item() for _ in range(5)]
    queue = queue_of(*items)
    assert queue.take(8, 8) == items
    queue.push_suspects(items[:3])
    queue.push_suspects(items[3:])
    ordinary = Item()
    queue.push(ordinary)
    assert [queue.take(8, 8), queue.take(8, 8)] == [[ordinary], []]
    # A group that has grown too large for a batch leaves in parts.
    taken = [queue.take_suspects(2, 8) for _ in range(4)]
    assert taken == [items[:2], [items[2]], items[3:], []]


@pytest.mark.parametrize("kind", ["ordinary", "rerun", "suspect"])
def test_a_forgotten_item_is_free_at_once(kind: str) -> None:
    """Its body may be large, and those before it may wait for long."""
    ahead, item = Item(), Item()
    gone = weakref.ref(item)
    queue = queue_of(ahead, item)
    if kind != "ordinary":
        assert queue.take(8, 8) == [ahead, item]
    if kind == "rerun":
        queue.push_rerun(ahead)
        queue.push_rerun(item)
    if kind == "suspect":
        queue.push_suspects([ahead, item])
    queue.forget(item)
    gc.disable()
    try:
        del item
        assert gone() is None
    finally:
        gc.enable()
    assert list(queue) == [ahead]


@given(st.integers(1, 5000), st.booleans())
def test_suspects_are_regrouped_so_that_three_losses_single_one_out(lost: int, again: bool) -> None:
    batch = [Item() for _ in range(lost)]
    groups = list(suspect_groups(batch, lost, again=again))
    assert [item for group in groups for item in group] == batch
    largest = max(map(len, groups))
    if again or lost <= 8:
        assert largest == 1
    else:
        # Neither the groups nor the members of a guilty one are many runs.
        assert largest <= math.sqrt(lost) + 1
        assert len(groups) <= math.sqrt(lost) + 1


def test_the_size_of_a_group_counts_all_that_were_lost() -> None:
    """A batch of four, lost with another one of sixty: not four groups of one."""
    assert [len(g) for g in suspect_groups([Item() for _ in range(4)], 64, again=False)] == [4]


def test_shapes_that_come_and_go_leave_nothing() -> None:
    queue: RequestQueue[Item] = RequestQueue()
    for key in range(1000):
        item = Item(key=key)
        queue.push(item)
        queue.forget(item)
        queue.forget(item)
    assert len(queue._heads) < 20
    assert len(queue._lanes) == 0
    assert queue.take(8, 8) == []


rows_and_seconds = st.tuples(
    st.integers(1, 1024), st.floats(0, 100, allow_nan=False, allow_subnormal=False)
)


def test_nothing_is_predicted_before_the_first_run() -> None:
    assert ServiceModel().predict(8) == 0.0
    assert ServiceModel().drain(800, 8) == 0.0


@given(st.lists(rows_and_seconds, min_size=1, max_size=60), st.integers(0, 4096))
def test_a_prediction_is_a_duration_that_grows_with_the_rows(
    runs: list[tuple[int, float]], rows: int
) -> None:
    model = ServiceModel()
    for run in runs:
        model.observe(*run)
    shorter, longer = model.predict(rows), model.predict(rows + 1)
    assert math.isfinite(longer)
    assert 0.0 <= shorter <= longer
    assert model.predict(0) == 0.0


@given(
    st.floats(0, 1, allow_subnormal=False),
    st.floats(1e-6, 0.1),
    st.lists(st.integers(1, 256), min_size=2, max_size=50),
    st.integers(1, 512),
)
def test_exact_runs_are_learnt_exactly(
    base: float, slope: float, sizes: list[int], rows: int
) -> None:
    assume(len(set(sizes)) > 1)
    model = ServiceModel()
    for size in sizes:
        model.observe(size, base + slope * size)
    assert model.predict(rows) == pytest.approx(base + slope * rows, rel=1e-3, abs=1e-5)


@given(st.integers(1, 64), st.floats(1e-6, 1), st.integers(1, 512))
def test_runs_of_one_size_are_extrapolated_through_the_origin(
    size: int, seconds: float, rows: int
) -> None:
    model = ServiceModel()
    for _ in range(5):
        model.observe(size, seconds)
    assert model.predict(rows) == pytest.approx(seconds * rows / size, rel=1e-6)


def test_later_runs_outweigh_earlier_ones() -> None:
    model = ServiceModel()
    for _ in range(200):
        model.observe(1, 1.0)
        model.observe(8, 8.0)
    for _ in range(200):
        model.observe(1, 0.1)
        model.observe(8, 0.8)
    assert model.predict(4) == pytest.approx(0.4, rel=0.05)


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_draining_a_queue_takes_the_time_of_its_batches(rows: int, max_rows: int) -> None:
    model = ServiceModel()
    for size in (1, 2, 8, 64):
        model.observe(size, 0.01 + 0.001 * size)
    batches = [max_rows] * (rows // max_rows) + [rows % max_rows]
    expected = sum(0.01 + 0.001 * size for size in batches if size)
    assert model.drain(rows, max_rows) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 20), st.integers(1, 10))
def test_separate_runs_cost_their_start_each(runs: int, rows_each: int) -> None:
    model = ServiceModel()
    for size in (1, 2, 8, 64):
        model.observe(size, 0.01 + 0.001 * size)
    expected = runs * (0.01 + 0.001 * rows_each)
    assert model.predict(runs * rows_each, runs) == pytest.approx(expected, rel=1e-6)
