"""The canary alone, in the bake: a one-arm test of what stable did before, ready for triggers.

All requests go to it, and nothing is left to compare it with but a bound. Stable's rate of the
event, over all that it answered before, has an upper confidence bound u; tolerated in the bake is

    q0 = max(3·u, u + margin, r0·u + δ).

The test is `log_e_bounded`: an e-value against "the canary's rate was never above q0". It cannot
tell a bad version from a bad hour: what triples stable's rate, and adds the margin, within the bake
is blamed on the canary. That is why the tolerance is so wide. Small faults are a matter of the
steps, where stable answers at the same time.

A canary that was well for long would have saved up failures for later, so the bake has parts, each
an epoch, and a fresh copy of the test starts with each; evidence is the average of all that are
planned, those that have not started count 1.

A trigger's share w·α of the error budget is divided: `STEPS` for the comparison with stable, `BAKE`
for this test, `BASELINE` for a bound u that is too low. The first two are e-values of the same
data, and their weighted sum reaches 1/(w·α) with a chance of at most (STEPS + BAKE)·w·α.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log, log1p
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.core.clusters import design_effect
from serving.core.evidence import confidence_sequence, log_average, log_e_bounded
from serving.core.rollout_counts import ArmCountsRow, EpochCounts, Tally
from serving.core.rollout_types import Epoch
from serving.core.two_arms import Null, tables, total, witnesses

STEPS: Final = 0.90
BAKE: Final = 0.05
BASELINE: Final = 0.05
"""What the comparison, the bake's test and the bake's bound have of a trigger's error budget."""

PARTS: Final = 12
_PART_S: Final = 300.0
"""A bake has at most so many parts, none of them shorter."""

FACTOR: Final = 3.0
"""The canary may always have so many times stable's rate."""
LARGE: Final = 1000
"""Units of stable that make an epoch's own rate count."""
# What is bet on rates above the bound, and the prior of stable's own.
_WORSE: Final = (0.5, 5.0)
_STABLE: Final = (0.5, 0.5)

Event = Callable[[ArmCountsRow], Tally]
"""Units and events of an arm's counts."""


def parts(duration_s: float) -> int:
    """How many parts a bake of this length has."""
    return int(min(max(duration_s // _PART_S, 1), PARTS))


def part_at(seconds: float, duration_s: float) -> int:
    """Which part of a bake it is, `seconds` after it began."""
    count = parts(duration_s)
    return int(min(max(count * seconds / duration_s, 0), count - 1)) if duration_s else 0


def spent(log_e_steps: float, log_e_bake: float = 0.0) -> float:
    """The log e-value of a trigger that divides its error budget as this module says."""
    low, high = sorted((log(STEPS) + log_e_steps, log(BAKE) + log_e_bake))
    return high + log1p(exp(low - high))


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What is tolerated: `null` as beside stable, and in any case `margin` more than its rate.

    `risk` is the chance that stable's rate is above the upper bound that it is taken to be.
    """

    null: Null
    margin: float
    risk: float

    def of(self, stable: NDArray[np.float64]) -> float:
        """The rate that the canary may have, where stable counted (epochs, 4); 1 and more is any.

        The bound is of stable's rate over all epochs, or in the worst one that says enough: where
        users stick to their version each counts with its first failure, so new ones fail more.
        """
        effective = stable[:, :2] / design_effect(stable)[:, np.newaxis]
        rows = [effective.sum(axis=0), *effective[effective[:, 0] >= LARGE]]
        upper = max(_upper(float(k), float(n), self.risk) for n, k in rows)
        null = self.null
        return max(FACTOR * upper, upper + self.margin, null.r0 * upper + null.delta)


@lru_cache(maxsize=256)
def _upper(k: float, n: float, risk: float) -> float:
    # Stable's counts stay as they are throughout the bake, and every tick asks.
    return confidence_sequence(k, n, risk, *_STABLE)[1]


class Watch:
    """The canary's counts of one kind of event while it was alone.

    `last` is the number of the plan's steps, `planned` how many parts the bake has.
    """

    def __init__(
        self,
        epochs: Sequence[Epoch],
        counts: Mapping[int, EpochCounts],
        event: Event,
        tolerance: Tolerance,
        *,
        last: int,
        planned: int,
    ) -> None:
        alone = [e for e in epochs if e.step >= last and e.weight == 1.0]
        self._parts = [e.part for e in alone]
        self._planned = max([planned, *(part + 1 for part in self._parts)])

        def count(_: Epoch, row: ArmCountsRow) -> Tally:
            return event(row)

        rows = [counts.get(e.epoch, EpochCounts()).canary for e in alone]
        self._canary = tables(alone, rows, count)
        self._whole = total(self._canary, len(alone))
        self.tolerated = 1.0
        if alone and self._whole.any():
            before = [e for e in epochs if e.epoch < alone[0].epoch]
            beside = [counts.get(e.epoch, EpochCounts()).stable for e in before]
            self.tolerated = tolerance.of(total(tables(before, beside, count), len(before)))

    @property
    def canary(self) -> tuple[int, int]:
        """The canary's units and events."""
        n, k = self._whole[:, :2].sum(axis=0)
        return int(n), int(k)

    @property
    def clusters(self) -> int:
        """How many clusters its events make at most."""
        return int(min(self._whole[:, 1].sum(), self._whole[:, 3].sum()))

    @property
    def log_e(self) -> float:
        """Log e-value against a rate of `tolerated` or less."""
        return self._log_e(self._whole)

    @property
    def without(self) -> dict[str, float]:
        """By replica of several that have seen enough: `log_e` had it not been there."""
        units = {name: float(table[:, 0].sum()) for name, table in self._canary.items()}
        return {name: self._log_e(self._whole - self._canary[name]) for name in witnesses(units)}

    def _log_e(self, canary: NDArray[np.float64]) -> float:
        if not canary.any() or self.tolerated >= 1.0:
            return 0.0
        effective = canary[:, :2] / design_effect(canary)[:, np.newaxis]
        found = []
        for part in range(self._planned):
            n, k = effective[[p >= part for p in self._parts]].sum(axis=0)
            started = part <= self._parts[-1]
            found.append(log_e_bounded(k, n, self.tolerated, *_WORSE) if started else 0.0)
        return log_average(found)
