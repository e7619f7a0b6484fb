"""Which bin each item of a group goes into: heterogeneous bin packing, whole groups or none.

The score of a packing, compared from left to right, less is better:

1. groups left out;
2. items in bins to be avoided;
3. items that share a bin with one of their own team;
4. bins in use.

Bin packing is NP-hard, so this works in two stages. Greedy packings come first, in several orders:
each item goes to the bin that costs the score least. Largest items first leaves few holes, smallest
groups first leaves few groups out. Then a branch and bound starts from the best of them. It visits
one of several bins that cannot be told apart and turns back where the rest cannot beat the best
packing known. It ends with the optimum where the instance is small, and after a fixed effort with
the best it has seen where it is not. Nothing depends on time or chance: the same input has the same
result everywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

EFFORT: Final = 60_000
"""Bins that the search looks at before it settles: at most some 200 ms of CPU time."""
SEARCHED_ITEMS: Final = 100
"""With more items than this the search would not get far: the best greedy packing stands."""

Score = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Bin:
    """A bin with `free` room. `used`: it holds something already; `avoid`: the last resort."""

    free: int
    used: bool = False
    avoid: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """`count` items of `size` for the bins `allowed`; items of one `team` keep apart."""

    count: int
    size: int
    allowed: tuple[int, ...]
    team: int


Packing = Mapping[int, tuple[int, ...]]
"""The bin of each item, by the number of its group; groups that are left out are absent."""


def pack(
    bins: Sequence[Bin],
    groups: Sequence[Group],
    present: Mapping[tuple[int, int], int],
) -> dict[int, tuple[int, ...]]:
    """Pack as many whole groups as fit, by the score above.

    `present` says how many items of (bin, team) the bins hold already.
    """
    problem = _Problem(tuple(bins), tuple(groups), dict(present))
    best = min(_greedy_packings(problem), key=lambda found: found[0])
    best = _improved(problem, best[1])
    if best[0] > problem.least() and sum(g.count for g in groups) <= SEARCHED_ITEMS:
        best = _Search(problem, best).run()
    state = _State(problem)
    for group, chosen in best[1].items():
        for b in chosen:
            state.put(group, b)
    left = sorted(set(range(len(groups))) - best[1].keys(), key=lambda g: groups[g].size)
    return {**best[1], **_fill(state, left, tight=True)}


@dataclass(frozen=True, slots=True)
class _Problem:
    bins: tuple[Bin, ...]
    groups: tuple[Group, ...]
    present: dict[tuple[int, int], int]

    def least(self) -> Score:
        """A score that no packing is below."""
        used = sum(b.used for b in self.bins)
        room = sum(b.free for b in self.bins if b.used)
        wanted = sum(g.count * g.size for g in self.groups)
        return 0, 0, 0, used + _bins_for(wanted - room, (b.free for b in self.bins if not b.used))


def _bins_for(wanted: int, free: Iterable[int]) -> int:
    """How many bins at least hold `wanted`, however it may be cut up."""
    count = 0
    for room in sorted(free, reverse=True):
        if wanted <= 0:
            break
        wanted -= room
        count += 1
    return count


class _State:
    """Bins as they fill up."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.free = [b.free for b in problem.bins]
        self.items = [int(b.used) for b in problem.bins]
        self.teams = dict(problem.present)
        self.avoided = 0
        self.crowded = 0
        self.bins = sum(self.items)

    def put(self, group: int, b: int) -> None:
        """Put one item of `group` into bin `b`."""
        g = self.problem.groups[group]
        self.free[b] -= g.size
        self.bins += not self.items[b]
        self.items[b] += 1
        self.avoided += self.problem.bins[b].avoid
        here = self.teams.get((b, g.team), 0)
        self.crowded += here > 0
        self.teams[b, g.team] = here + 1

    def take(self, group: int, b: int) -> None:
        """Undo a `put`."""
        g = self.problem.groups[group]
        self.free[b] += g.size
        self.items[b] -= 1
        self.bins -= not self.items[b]
        self.avoided -= self.problem.bins[b].avoid
        self.teams[b, g.team] -= 1
        self.crowded -= self.teams[b, g.team] > 0

    def score(self, left_out: int) -> Score:
        return left_out, self.avoided, self.crowded, self.bins


def _greedy_packings(problem: _Problem) -> Iterable[tuple[Score, dict[int, tuple[int, ...]]]]:
    groups = problem.groups

    def largest(g: int) -> tuple[int, int, int]:
        return -groups[g].size, len(groups[g].allowed), -groups[g].count

    everything = range(len(groups))
    by_size = sorted(everything, key=largest)
    by_total = sorted(everything, key=lambda g: (groups[g].size * groups[g].count, groups[g].size))
    for tight in (True, False):
        yield _greedy(problem, by_size, tight=tight)
        few = _greedy(problem, by_total, tight=tight)
        yield few
        # Those that smallest-first lets in, largest first, and the others after them.
        chosen = sorted(few[1], key=largest)
        rest = [g for g in by_total if g not in few[1]]
        yield _greedy(problem, [*chosen, *rest], tight=tight)


def _greedy(
    problem: _Problem, order: Sequence[int], *, tight: bool
) -> tuple[Score, dict[int, tuple[int, ...]]]:
    state = _State(problem)
    packed = _fill(state, order, tight=tight)
    return state.score(len(problem.groups) - len(packed)), packed


def _fill(state: _State, order: Iterable[int], *, tight: bool) -> dict[int, tuple[int, ...]]:
    """Put each group of `order` where it fits whole. `tight`: open the smallest bin that does."""
    packed = {}
    for group in order:
        if chosen := _choose(state, group, tight=tight):
            packed[group] = tuple(chosen)
    return packed


def _choose(state: _State, group: int, *, tight: bool) -> list[int]:
    g = state.problem.groups[group]

    def cost(b: int) -> tuple[bool, int, bool, int, int]:
        opened = not state.items[b]
        room = -state.free[b] if opened and not tight else state.free[b]
        return state.problem.bins[b].avoid, state.teams.get((b, g.team), 0), opened, room, b

    heap = [cost(b) for b in g.allowed if state.free[b] >= g.size]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < g.count:
        b = heap[0][-1]
        state.put(group, b)
        chosen.append(b)
        if state.free[b] >= g.size:
            heapq.heapreplace(heap, cost(b))
        else:
            heapq.heappop(heap)
    if len(chosen) == g.count:
        return chosen
    for b in chosen:
        state.take(group, b)
    return []


def _improved(
    problem: _Problem, packed: Mapping[int, tuple[int, ...]]
) -> tuple[Score, dict[int, tuple[int, ...]]]:
    """Move single items while that makes the score less."""
    state = _State(problem)
    places = {group: list(chosen) for group, chosen in packed.items()}
    for group, chosen in places.items():
        for b in chosen:
            state.put(group, b)
    left_out = len(problem.groups) - len(places)
    moved = True
    while moved:
        moved = False
        for group, chosen in places.items():
            for i, b in enumerate(chosen):
                better = _better_bin(state, group, b)
                if better != b:
                    state.take(group, b)
                    state.put(group, better)
                    chosen[i], moved = better, True
    return state.score(left_out), {group: tuple(chosen) for group, chosen in places.items()}


def _better_bin(state: _State, group: int, b: int) -> int:
    """Where an item of `group` that is in `b` costs least; `b` where nothing is better."""
    g, bins = state.problem.groups[group], state.problem.bins

    def cost(other: int, own: int) -> tuple[bool, bool, bool]:
        crowded = state.teams.get((other, g.team), 0) > own
        return bins[other].avoid, crowded, state.items[other] == own

    now = cost(b, 1)
    if not any(now):
        return b
    best, found = now, b
    for other in g.allowed:
        if other != b and state.free[other] >= g.size and cost(other, 0) < best:
            best, found = cost(other, 0), other
    return found


@dataclass
class _Search:
    """Depth first over groups, largest first: each either whole or left out."""

    problem: _Problem
    best: tuple[Score, dict[int, tuple[int, ...]]]
    effort: int = EFFORT
    _chosen: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def run(self) -> tuple[Score, dict[int, tuple[int, ...]]]:
        groups, bins = self.problem.groups, self.problem.bins
        self._order = sorted(
            range(len(groups)), key=lambda g: (-groups[g].size, groups[g].team, -groups[g].count)
        )
        self._left = [0]
        for g in reversed(self._order):
            self._left.insert(0, self._left[0] + groups[g].size * groups[g].count)
        self._state = _State(self.problem)
        self._least = self.problem.least()
        # What is in a bin, in a form in which bins that are alike are equal.
        allowed = [tuple(b in g.allowed for g in groups) for b in range(len(bins))]
        teams: list[list[tuple[int, int]]] = [[] for _ in bins]
        for (b, team), count in sorted(self.problem.present.items()):
            teams[b].append((team, count))
        self._alike: list[tuple[object, ...]] = [
            (x, allowed[b], tuple(teams[b])) for b, x in enumerate(bins)
        ]
        self._group(0, 0)
        return self.best

    def _group(self, depth: int, left_out: int) -> None:
        if self.effort <= 0 or self._hopeless(depth, left_out):
            return
        if depth == len(self._order):
            self.best = self._state.score(left_out), dict(self._chosen)
            return
        self._items(depth, left_out, [], 0)
        self._group(depth + 1, left_out + 1)

    def _items(self, depth: int, left_out: int, chosen: list[int], first: int) -> None:
        """The group's next item into each bin from its `first` allowed one on."""
        group = self._order[depth]
        g = self.problem.groups[group]
        if len(chosen) == g.count:
            self._chosen[group] = tuple(chosen)
            self._group(depth + 1, left_out)
            del self._chosen[group]
            return
        for position, b in self._candidates(g, first):
            if self.effort <= 0:
                return
            before = self._alike[b]
            self._state.put(group, b)
            self._alike[b] = (*before, group)
            chosen.append(b)
            if not self._hopeless(depth, left_out, len(chosen)):
                self._items(depth, left_out, chosen, position)
            chosen.pop()
            self._alike[b] = before
            self._state.take(group, b)

    def _candidates(self, g: Group, first: int) -> list[tuple[int, int]]:
        """(position among the allowed, bin), the most promising first, one of those alike."""
        found, seen = [], set()
        for position in range(first, len(g.allowed)):
            self.effort -= 1
            b = g.allowed[position]
            if self._state.free[b] < g.size or self._alike[b] in seen:
                continue
            seen.add(self._alike[b])
            here = self._state.teams.get((b, g.team), 0)
            cost = self.problem.bins[b].avoid, here, not self._state.items[b], self._state.free[b]
            found.append((cost, position, b))
        return [(position, b) for _, position, b in sorted(found)]

    def _hopeless(self, depth: int, left_out: int, put: int = 0) -> bool:
        """Whether nothing from here on beats the best; `put` items of the group are in."""
        best, state = self.best[0], self._state
        if best <= self._least:
            return True
        now = state.score(left_out)
        if now[:3] != best[:3]:
            return now[:3] > best[:3]
        # As good so far only if all that is left goes in, at no cost but that of new bins.
        size = self.problem.groups[self._order[depth]].size if put else 0
        wanted = self._left[depth] - put * size
        self.effort -= len(state.free)
        room = sum(f for f, n in zip(state.free, state.items, strict=True) if n)
        more = _bins_for(
            wanted - room, (f for f, n in zip(state.free, state.items, strict=True) if not n)
        )
        return now[3] + more >= best[3]
