"""What the inferences of a rollout's two arms cost directly, and the windows in which they compare.

Direct cost is the device time of runs whose answers went to clients, times the replica's price. A
small share of traffic runs in small batches, and so costs more with the very same model: costs
compare only while both arms are of equal size, half of the requests each on as many replicas. That
time is cut into windows, each with one ratio of costs: what `evidence.log_e_means` bets on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import fsum, log
from typing import Any, Final

from serving.core.rollout_counts import ArmCountsRow, EpochCounts
from serving.core.rollout_facts import CostMark, CostWindow, CostWindows, Uses
from serving.core.rollout_types import Rollout

EQUAL: Final = 0.5
"""The weight at which stable is a baseline of the canary's size."""
MIN_INFERENCES: Final = 30
"""Of each arm, in a window."""
_MAX_WINDOWS: Final = 256
_CORRELATED: Final = 0.3
_S_PER_HOUR: Final = 3600.0

Prices = Mapping[str, float | None]
"""USD an hour by replica; absent or None where it is not known."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What `inferences` cost in nano-USD, and how long they had a device.

    `unpriced` names a replica whose price is not known; then `nano_usd` leaves it out.
    """

    nano_usd: float
    ns: int
    inferences: int
    unpriced: str = ""

    @property
    def usd_per_1000(self) -> float | None:
        """None without inferences or time, and where a price is not known."""
        priced = self.inferences and self.ns and not self.unpriced
        return self.nano_usd / self.inferences / 1e6 if priced else None

    @property
    def s_per_1000(self) -> float | None:
        """Device time; None without inferences or time."""
        return self.ns / self.inferences / 1e6 if self.inferences and self.ns else None


def uses(counts: Iterable[Mapping[str, ArmCountsRow]]) -> Uses:
    """Device time and answered inferences by replica, over several epochs of one arm."""
    found: dict[str, tuple[int, int]] = {}
    for rows in counts:
        for replica, row in rows.items():
            ns, n = found.get(replica, (0, 0))
            found[replica] = ns + row.busy_ns, n + row.answered
    return found


def spent(used: Uses, prices: Prices) -> Spent:
    """What device time comes to."""
    known = {r: price for r, price in prices.items() if price is not None}
    return Spent(
        fsum(ns * known[r] / _S_PER_HOUR for r, (ns, _) in used.items() if r in known),
        sum(ns for ns, _ in used.values()),
        sum(n for _, n in used.values()),
        next((r for r, (ns, _) in sorted(used.items()) if ns and r not in known), ""),
    )


def at_equal_size(rollout: Rollout, canary_ready: int, stable_ready: int) -> bool:
    """Whether stable is a baseline of the canary's size now."""
    return rollout.weight == rollout.current.weight == EQUAL and canary_ready == stable_ready > 0


def mark(rollout: Rollout, counts: Mapping[int, EpochCounts], at: float) -> CostMark:
    """What both arms have used by now in the epochs of equal shares."""
    equal = [counts[e.epoch] for e in rollout.epochs if e.weight == EQUAL and e.epoch in counts]
    return CostMark(at, uses(c.canary for c in equal), uses(c.stable for c in equal))


def after_look(windows: CostWindows, now: CostMark | None, prices: Prices) -> CostWindows:
    """With what has been used by `now`; None while the arms are not of equal size.

    A window that such a time falls into is dropped, and so is one with a replica of no known price.
    """
    if now is None or windows.since is None:
        return replace(windows, since=now)
    since = windows.since
    canary, stable = _less(now.canary, since.canary), _less(now.stable, since.stable)
    if any(ns < 0 or n < 0 for used in (canary, stable) for ns, n in used.values()):
        # A controller that has just started knows less than was counted, for a moment.
        return windows
    arms = spent(canary, prices), spent(stable, prices)
    few = min(arm.inferences for arm in arms) < MIN_INFERENCES
    if now.at - since.at < windows.width_s or few:
        return windows
    if any(arm.unpriced or not arm.nano_usd for arm in arms):
        return replace(windows, since=now)
    costs = {r: (spent({r: u}, prices).nano_usd, u[1]) for r, u in canary.items() if u[1]}
    closed = (*windows.closed, CostWindow(costs, (arms[1].nano_usd, arms[1].inferences)))
    if len(closed) < _MAX_WINDOWS:
        return replace(windows, since=now, closed=closed)
    return CostWindows(now, paired(closed), windows.width_s * 2)


def paired(windows: Sequence[CostWindow]) -> tuple[CostWindow, ...]:
    """Windows twice as long; the last one of an odd number is left out."""
    return tuple(_joined(a, b) for a, b in zip(windows[::2], windows[1::2], strict=False))


def log_ratios(windows: Sequence[CostWindow], without: str = "") -> list[float]:
    """ln(canary's cost per inference / stable's) of each window, less one replica of the canary."""
    found = []
    for window in windows:
        costs = [cost for replica, cost in window.canary.items() if replica != without]
        nano, n = fsum(c for c, _ in costs), sum(n for _, n in costs)
        if n >= MIN_INFERENCES and nano > 0:
            found.append(log(nano / n) - log(window.stable[0] / window.stable[1]))
    return found


def independent(windows: Sequence[CostWindow], at_least: int) -> Sequence[CostWindow]:
    """Windows so long that what one says is not said by the one before it.

    They are lengthened as long as `at_least` of them are left.
    """
    while len(windows) // 2 >= at_least and _lag_one(log_ratios(windows)) > _CORRELATED:
        windows = paired(windows)
    return windows


def _lag_one(values: Sequence[float]) -> float:
    """The correlation of each value with the one before it; 0 where all are equal."""
    mean = fsum(values) / len(values)
    off = [value - mean for value in values]
    spread = fsum(x * x for x in off)
    return fsum(a * b for a, b in pairwise(off)) / spread if spread else 0.0


def _joined(a: CostWindow, b: CostWindow) -> CostWindow:
    nothing = (0.0, 0)
    canary = {
        r: _sum(a.canary.get(r, nothing), b.canary.get(r, nothing))
        for r in sorted({*a.canary, *b.canary})
    }
    return CostWindow(canary, _sum(a.stable, b.stable))


def _sum(a: tuple[float, int], b: tuple[float, int]) -> tuple[float, int]:
    return a[0] + b[0], a[1] + b[1]


def _less(used: Uses, before: Uses) -> Uses:
    return {
        r: (used.get(r, (0, 0))[0] - ns, used.get(r, (0, 0))[1] - n)
        for r, (ns, n) in {**dict.fromkeys(used, (0, 0)), **before}.items()
    }


def windows_to_dict(windows: CostWindows) -> dict[str, Any]:
    """Plain JSON types, for the store."""
    since = windows.since
    return {
        "since": None if since is None else [since.at, dict(since.canary), dict(since.stable)],
        "closed": [[dict(w.canary), list(w.stable)] for w in windows.closed],
        "width_s": windows.width_s,
    }


def windows_from_dict(raw: Mapping[str, Any]) -> CostWindows:
    """Read `windows_to_dict`'s form, after JSON too."""
    since = raw["since"]
    return CostWindows(
        None if since is None else CostMark(since[0], *(_pairs(used) for used in since[1:])),
        tuple(
            CostWindow(_pairs(canary), (stable[0], stable[1])) for canary, stable in raw["closed"]
        ),
        raw["width_s"],
    )


def _pairs(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {replica: tuple(pair) for replica, pair in raw.items()}
