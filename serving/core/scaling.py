"""How many replicas an arm is to have: pure decisions, by queue delay and by how busy replicas are.

Two signals, as a controller with feed-forward and feedback has them:

- saturation says how much work there is: `busy` replicas at `target_utilization` each are
  `ceil(busy / target_utilization)` replicas. It is the same however many replicas share the work,
  so a decision does not feed on itself.
- queue delay says whether that is enough for clients. Where it is over its target although work
  would fit, there are too few all the same: one more, up to twice as many.

Up goes what two observations in a row ask for, at most to twice the replicas that are ready. Down
goes what the whole of `scale_down_after_s` would have allowed, at most to half. Between the two is
a dead band, and a number that was gone down to and proved too few is not tried again while the rate
of requests stays: a steady load converges to a number and keeps it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, NamedTuple

from serving.errors import ConfigError

UP_OBSERVATIONS: Final = 2
MAX_STEP: Final = 2.0
"""At most so many times the ready replicas in one step up, and this share of them in one down."""
DOWN_MARGIN: Final = 0.8
"""Down only where fewer replicas would be busy at most this share of the target."""
_FEEDBACK_BUSY: Final = 0.5
"""Below this share of the target utilisation more replicas do not shorten the queue delay."""
_SAME_RATE: Final = 0.8
WINDOW_S: Final = 5.0
"""What an observation looks back on; so long after a replica came or went it shows the past."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What scaling is held to. Durations are seconds; `wake_queue` counts requests.

    `least` 0 allows that an idle arm has no replica at all.
    """

    least: int = 1
    most: int = 1
    target_queue_delay_s: float = 0.01
    target_utilization: float = 0.7
    scale_down_after_s: float = 60.0
    idle_to_zero_after_s: float = 600.0
    wake_queue: int = 1000

    def __post_init__(self) -> None:
        """Raise `ConfigError` where the bounds are none."""
        if not 0 <= self.least <= self.most or self.most < 1:
            raise ConfigError(f"scaling from {self.least} to {self.most} replicas is impossible")

    @property
    def sleeps(self) -> bool:
        """Whether it may come to no replica at all."""
        return self.least == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Observation:
    """An arm over the last few seconds, until `now` (monotonic seconds).

    `queue_delay_s` is a high quantile, None where nothing was answered and nothing waits; `busy` is
    the run time of all replicas over the time that passed (1.0: one is always busy), None where no
    replica has said it yet; `rate` the requests a second that a replica could have answered,
    refused ones too; `waiting` those that wait now, `in_flight` those at replicas. `floor` replicas
    are kept for a rollout.
    """

    now: float
    ready: int
    queue_delay_s: float | None
    busy: float | None
    rate: float
    waiting: int = 0
    floor: int = 0
    in_flight: int = 0


class Wish(NamedTuple):
    """What one observation alone would go up to and down to, and the requests a second it saw."""

    at: float
    up: int
    down: int
    rate: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What decisions remember of the past.

    `wishes` are those within the cool-down, `since` is when the last began. `short` are replicas
    that were gone down to and were too few, and the rate then; `lowered`: it went down before.
    `active_at` is when there was last a request. So many replicas are `ready` since `ready_since`.
    """

    since: float
    active_at: float
    wishes: tuple[Wish, ...] = ()
    short: tuple[int, float] | None = None
    lowered: bool = False
    ready: int = 0
    ready_since: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """So many replicas are wanted, because of `reason`; `memory` is for the next decision."""

    wanted: int
    reason: str
    memory: Memory


def begin(now: float) -> Memory:
    """The memory of who has seen nothing yet: nothing goes down before a whole cool-down."""
    return Memory(now, now)


def decide(scaling: Scaling, wanted: int, seen: Observation, memory: Memory) -> Decision:
    """The number of replicas to have, from the number `wanted` so far."""
    memory = _remember(scaling, wanted, seen, memory)
    floor = min(seen.floor, scaling.most)
    lower = max(1, scaling.least, floor)
    if wanted == 0:
        return _asleep(scaling, seen, memory, floor)
    if not lower <= wanted <= scaling.most:
        bounded = min(max(wanted, lower), scaling.most)
        why = f"kept at {floor} for the rollout" if bounded == floor else _bounds(scaling)
        return Decision(bounded, why, memory)
    up = min(_steady_up(wanted, memory), scaling.most)
    if up > wanted:
        short = (wanted, seen.rate) if memory.lowered else None
        return Decision(up, _why_up(scaling, seen), replace(memory, since=seen.now, short=short))
    idle_s = seen.now - memory.active_at
    if scaling.sleeps and not floor and idle_s >= scaling.idle_to_zero_after_s:
        return Decision(0, f"asleep after {idle_s:.0f} s without a request", begin(seen.now))
    down = max(_steady_down(scaling, wanted, seen, memory), lower)
    if down < wanted:
        why = f"{_load(scaling, seen)} for {scaling.scale_down_after_s:g} s"
        after = replace(memory, wishes=(), since=seen.now, lowered=True)
        return Decision(down, why, after)
    return Decision(wanted, _why_stay(scaling, wanted, seen, memory), memory)


def _asleep(scaling: Scaling, seen: Observation, memory: Memory, floor: int) -> Decision:
    awake = begin(seen.now)
    if floor > scaling.least:
        return Decision(floor, f"woken: a rollout needs {floor}", awake)
    if not scaling.sleeps:
        return Decision(scaling.least, f"woken: {_bounds(scaling)}", awake)
    if seen.waiting or seen.rate > 0:
        return Decision(1, f"woken: {max(1, seen.waiting)} waiting", awake)
    return Decision(0, "asleep: a request wakes it", memory)


def _remember(scaling: Scaling, wanted: int, seen: Observation, memory: Memory) -> Memory:
    if seen.ready != memory.ready:
        memory = replace(memory, ready=seen.ready, ready_since=seen.now)
    up, down = _wishes(scaling, wanted, seen, settled=_settled(seen, memory))
    kept = tuple(w for w in memory.wishes if w.at >= seen.now - scaling.scale_down_after_s)
    # What a model itself refuses shows as busy alone.
    active = any(n > 0 for n in (seen.rate, seen.waiting, seen.in_flight, seen.busy or 0.0))
    return replace(
        memory,
        wishes=(*kept, Wish(seen.now, up, down, seen.rate)),
        active_at=seen.now if active else memory.active_at,
    )


def _settled(seen: Observation, memory: Memory) -> bool:
    return seen.now - memory.ready_since >= WINDOW_S


def _wishes(scaling: Scaling, wanted: int, seen: Observation, *, settled: bool) -> tuple[int, int]:
    """What this observation alone would go up to, and down to."""
    if seen.busy is None:
        return wanted, wanted
    up = _ceil(seen.busy / scaling.target_utilization)
    down = max(1, _ceil(seen.busy / (DOWN_MARGIN * scaling.target_utilization)))
    excess = (seen.queue_delay_s or 0.0) / scaling.target_queue_delay_s
    if excess > 1.0:
        if settled and _helps(scaling, seen):
            up = max(up, _ceil(seen.ready * min(excess, MAX_STEP)))
        # However little there is to do, now is no time for less.
        down = wanted
    # By those that are ready: what was asked for and has not come yet asks for nothing more.
    return min(up, _ceil(MAX_STEP * max(1, seen.ready))), down


def _helps(scaling: Scaling, seen: Observation) -> bool:
    """Whether replicas have so much to do that requests wait for one another."""
    threshold = _FEEDBACK_BUSY * scaling.target_utilization
    return seen.busy is not None and seen.busy >= threshold * seen.ready


def _steady_up(wanted: int, memory: Memory) -> int:
    last = memory.wishes[-UP_OBSERVATIONS:]
    return min(w.up for w in last) if len(last) == UP_OBSERVATIONS else wanted


def _steady_down(scaling: Scaling, wanted: int, seen: Observation, memory: Memory) -> int:
    if seen.now - memory.since < scaling.scale_down_after_s:
        return wanted
    down = max(w.down for w in memory.wishes)
    return max(down, _short(memory) + 1, _ceil(wanted / MAX_STEP))


def _short(memory: Memory) -> int:
    """So many replicas would be too few, at the rate of late."""
    if memory.short is None:
        return 0
    replicas, rate = memory.short
    return replicas if max(w.rate for w in memory.wishes) >= _SAME_RATE * rate else 0


def _ceil(value: float) -> int:
    # A sum of shares that is 2 may come out as 2.0000000001.
    return math.ceil(value - 1e-9)


def _bounds(scaling: Scaling) -> str:
    return f"from {scaling.least} to {scaling.most} are allowed"


def _load(scaling: Scaling, seen: Observation) -> str:
    delay = "nothing queued"
    if seen.queue_delay_s is not None:
        target = scaling.target_queue_delay_s * 1e3
        found = seen.queue_delay_s * 1e3
        delay = f"queue delay {found:{',.0f' if found >= 100 else '.3g'}} ms of {target:g} ms"
    if seen.busy is None:
        return delay
    return f"{delay}, {seen.busy:.2f} of {seen.ready} replicas busy"


def _why_up(scaling: Scaling, seen: Observation) -> str:
    return f"{_load(scaling, seen)} (at most {scaling.target_utilization:.0%} each)"


def _why_stay(scaling: Scaling, wanted: int, seen: Observation, memory: Memory) -> str:
    load = _load(scaling, seen)
    wish = memory.wishes[-1]
    if wanted == scaling.most and wish.up > wanted:
        return f"{load}; no more than max: {scaling.most} allowed"
    if seen.floor and wish.down < wanted:
        return f"{load}; kept at {seen.floor} for the rollout"
    if wish.down <= _short(memory):
        return f"{load}; {_short(memory)} were too few at this rate"
    return load
