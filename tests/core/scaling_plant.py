"""An arm as a queue with c servers of constant run time (M/D/c), driven by the pure decision.

Time is simulated: arrivals are drawn from a seeded Poisson process whose rate is a function of
time, replicas take a while to start, and each second the decision sees what a controller would.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from serving.core.scaling import WINDOW_S, Observation, Scaling, begin, decide

TICK_S = 1.0


@dataclass
class Run:
    """What happened: waits as (arrival, seconds), and the wanted replicas after each second."""

    waits: list[tuple[float, float]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def share_within(self, seconds: float, begin: float = 0.0, end: float = 1e9) -> float:
        """The share of requests that came in [begin, end) and waited at most `seconds`."""
        waits = [wait for at, wait in self.waits if begin <= at < end]
        return sum(wait <= seconds for wait in waits) / len(waits)

    def turns(self) -> int:
        """How often the wanted number went the other way than the last time it changed."""
        steps = [b - a for a, b in pairwise(self.wanted) if a != b]
        return sum((a > 0) != (b > 0) for a, b in pairwise(steps))

    @property
    def changes(self) -> int:
        return sum(a != b for a, b in pairwise(self.wanted))


def simulate(
    scaling: Scaling,
    rate: Callable[[float], float],
    *,
    seconds: int,
    run_s: float,
    start_s: float = 5.0,
    wanted: int = 1,
    seed: int = 1,
) -> Run:
    """`rate` gives requests a second at a time; each request is a run of `run_s`."""
    draw = random.Random(seed)
    run, memory = Run(), begin(0.0)
    ready, coming = wanted, list[float]()
    free = [0.0] * ready
    heapq.heapify(free)
    recent: list[tuple[float, float]] = []  # (start of the run, wait)
    arrived: list[float] = []
    at = 0.0
    for tick in range(1, seconds + 1):
        now = tick * TICK_S
        while True:
            step = draw.expovariate(max(rate(at), 1e-9))
            if at + step > now:
                # The process has no memory: what is left of this step is drawn anew.
                at = now
                break
            at += step
            begins = max(at, heapq.heappop(free))
            heapq.heappush(free, begins + run_s)
            run.waits.append((at, begins - at))
            recent.append((begins, begins - at))
            arrived.append(at)
        recent = [r for r in recent if r[0] + run_s > now - WINDOW_S]
        arrived = [a for a in arrived if a > now - WINDOW_S]
        told = [wait for begins, wait in recent if begins <= now]
        busy = sum(
            min(now, begins + run_s) - max(now - WINDOW_S, begins)
            for begins, _ in recent
            if begins < now
        )
        seen = Observation(
            now,
            ready,
            float(np.quantile(told, 0.95)) if told else None,
            busy / WINDOW_S,
            len(arrived) / WINDOW_S,
            waiting=sum(begins > now for begins, _ in recent),
        )
        decision = decide(scaling, wanted, seen, memory)
        memory = decision.memory
        wanted = decision.wanted
        coming += [now + start_s] * (wanted - ready - len(coming))
        del coming[max(0, wanted - ready) :]
        while coming and coming[0] <= now:
            coming.pop(0)
            heapq.heappush(free, now)
            ready += 1
        while ready > max(1, wanted):
            # The one that is free first goes; what it had is done.
            heapq.heappop(free)
            ready -= 1
        run.wanted.append(wanted)
        run.reasons.append(decision.reason)
    return run
