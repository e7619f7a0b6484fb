"""Seats: where the replicas of an application run, one by one, and who moves off a cordoned GPU.

An application that runs on GPUs is a Ray Serve application for each of its replicas, so that each
starts on the node that was planned for it, and any one can go while the others stay. Such a Serve
application is a seat. If its replica dies, Serve starts another one in the same seat.

A move adds a seat first. Only when more replicas are ready than were asked for does one on a
cordoned GPU leave. Decided from what runs alone, so that a controller that has just lost its memory
goes on where the last one ended.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_SEAT: Final = re.compile(r"(?P<app>.+)\.(?P<number>\d+)")
_RAY_UNITS: Final = 10_000
"""Ray counts in ten-thousandths."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A replica's place: on `node`, if that is alive ("": any), taking `num_gpus` of Ray's GPUs."""

    number: int
    node: str = ""
    num_gpus: float = 1 / _RAY_UNITS


def seat_name(app: str, number: int) -> str:
    """The Serve application of a seat."""
    return f"{app}.{number}"


def app_of(name: str) -> str:
    """The application that a Serve application belongs to: itself, or the one it is a seat of."""
    found = _SEAT.fullmatch(name)
    return found["app"] if found else name


def number_of(seat: str) -> int:
    """A seat's number."""
    return int(seat.rpartition(".")[2])


def next_number(app: str, seats: Iterable[str]) -> int:
    """The number of an application's next seat, which none of `seats` has or had.

    Names of other applications, and the application's own, are no seats of it.
    """
    return 1 + max((number_of(s) for s in seats if s != app and app_of(s) == app), default=-1)


def ray_share(
    needed: int, memory_bytes: int, ray_gpus: float | None = None, devices: int = 1
) -> float:
    """What a lease of `needed` bytes on a GPU of `memory_bytes` takes of Ray's GPUs.

    It is half of the lease's share, rounded down. Ray fills one GPU after the other where placement
    spreads, so it may find the same shares on other GPUs, and what is left cut into smaller pieces.
    With halves it always has room for what fits by memory: were all n GPUs of a node too full for
    another share of up to 1/2, more than n/2 would be taken, but all of it together is at most n/2.
    `ray_gpus` is what Ray counts on the node where it counts less than its `devices`: slices.
    """
    counted = 1.0 if ray_gpus is None else min(1.0, ray_gpus / max(1, devices))
    share = min(1.0, needed / memory_bytes) * counted / 2
    return max(1, math.floor(share * _RAY_UNITS)) / _RAY_UNITS


class Stage(StrEnum):
    """How far a seat's replica is. LEAVING: it is on its way out, whatever it still does."""

    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Taken:
    """A seat that exists; `cordoned` says so of the GPU of its ready replica."""

    seat: str
    stage: Stage
    cordoned: bool = False


@dataclass(frozen=True, slots=True)
class Moves:
    """The next step: seats to `add`, seats that `leave`, replicas for which there is `no_room`."""

    add: int = 0
    leave: tuple[str, ...] = ()
    no_room: int = 0


def decide_moves(count: int, seats: Sequence[Taken], room: Callable[[int], int]) -> Moves:
    """What to do about an application of `count` replicas.

    `room` says how many of so many more replicas fit on GPUs that are not cordoned.
    """
    staying = [s for s in seats if s.stage is not Stage.LEAVING]
    moving = [s for s in staying if s.cordoned]
    spare = sum(s.stage is Stage.READY for s in staying) - count
    leave = _may_leave(moving, spare)
    more = len(moving) - (len(staying) - count)
    if more < 0:
        superfluous = _newest_first(staying)[:-more]
        return Moves(leave=(*leave, *_may_leave(superfluous, spare - len(leave))))
    missing = max(0, count - len(staying))
    fits = room(more - missing) if more > missing else 0
    return Moves(missing + fits, leave, more - missing - fits)


def _may_leave(seats: Sequence[Taken], spare: int) -> tuple[str, ...]:
    """Those of `seats` that can go while `spare` more are ready than are needed."""
    going = []
    for seat in seats:
        if seat.stage is Stage.READY:
            if spare <= 0:
                continue
            spare -= 1
        going.append(seat.seat)
    return tuple(going)


def _newest_first(seats: Sequence[Taken]) -> list[Taken]:
    """Healthy seats: those whose replica is not ready yet, then the highest numbers."""
    healthy = [s for s in seats if not s.cordoned]
    return sorted(healthy, key=lambda s: (s.stage is Stage.READY, -number_of(s.seat)))
