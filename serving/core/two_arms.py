"""A rollout's counts as evidence for or against its canary: the two-arm test, ready for triggers.

What an event is (a failed request, a slow one, a wrong label) is a `Count`: a function from an
epoch and an arm's counts in it to units and events. All else is the same for every event:

- an epoch has one share ρ of units that went to the canary, and so is one period of the test;
- events in clusters count for what they are worth (`serving.core.clusters`). Both arms' units are
  divided by their design effects, so ρ becomes the share of what is left;
- every step starts a fresh copy of the test, for a canary that turns bad late;
- evidence must not hang on one replica: where the canary has several, it is the least that is left
  when one of them is set aside. A slow machine is no fault of the version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.core.clusters import design_effect
from serving.core.evidence import ArmCounts, Period, log_e_late_onset, log_e_two_arms_pass
from serving.core.rollout_counts import NOTHING, ArmCountsRow, EpochCounts, Tally
from serving.core.rollout_types import Epoch

# A replica with less than this part of a replica's fair share is no second witness: one that died
# young, or has just started, would otherwise silence all others.
WITNESS: Final = 0.1
"""Of a fair share of the units: the least that makes a replica a witness."""

Count = Callable[[Epoch, ArmCountsRow], Tally]
"""Units and events of an arm (by request and by batch) in an epoch."""

_Table = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Null:
    """What is tolerated: p_canary ≤ r0·p_stable + delta."""

    r0: float
    delta: float


class Comparison:
    """Both arms' counts of one kind of event over all epochs.

    `assigned`: whether ρ is the epoch's weight, or else the share of units that each arm has.
    Requests are assigned by weight. But with units that stick to their arm (users) the canary may
    well get 15 % of the requests at a weight of 5 %: a failure counts once a unit, so for failures
    the weight is right; a slow request counts each time, so there the realised share is.
    """

    def __init__(
        self,
        epochs: Sequence[Epoch],
        counts: Mapping[int, EpochCounts],
        count: Count,
        *,
        assigned: bool,
    ) -> None:
        self._epochs = epochs
        self._assigned = assigned
        found = [counts.get(e.epoch, EpochCounts()) for e in epochs]
        self._canary = tables(epochs, [f.canary for f in found], count)
        self._stable = total(tables(epochs, [f.stable for f in found], count), len(epochs))
        self._whole = total(self._canary, len(epochs))
        self._in_stable = design_effect(self._stable)

    @property
    def canary(self) -> tuple[int, int]:
        """The canary's units and events, in all epochs in which both arms were open."""
        return self._sum(self._whole)

    @property
    def stable(self) -> tuple[int, int]:
        """Likewise the stable arm's."""
        return self._sum(self._stable)

    @property
    def clusters(self) -> int:
        """How many clusters the canary's events make at most: fewer than events or batches."""
        open_ = self._whole[self._open]
        return int(min(open_[:, 1].sum(), open_[:, 3].sum()))

    def log_e(self, null: Null, planned: int) -> float:
        """Log e-value against `null`, with `planned` steps: large when the canary is worse."""
        return log_e_late_onset(self._by_step(self._whole), self._planned(planned), *_args(null))

    def log_e_without(self, replica: str, null: Null, planned: int) -> float:
        """`log_e` had this replica of the canary not been there."""
        rest = self._whole - self._canary[replica]
        return log_e_late_onset(self._by_step(rest), self._planned(planned), *_args(null))

    def log_e_pass(self, null: Null) -> float:
        """Log e-value against the opposite of `null`: large when the canary is no worse."""
        return log_e_two_arms_pass(self._periods(self._whole), *_args(null))

    @property
    def witnesses(self) -> tuple[str, ...]:
        """The canary's replicas that each have seen enough to speak; none if there is only one."""
        units = {name: table[self._open, 0].sum() for name, table in self._canary.items()}
        return witnesses(units)

    @property
    def _open(self) -> NDArray[np.bool_]:
        return np.array([0 < e.weight < 1 for e in self._epochs], np.bool_)

    def _sum(self, table: _Table) -> tuple[int, int]:
        n, k = table[self._open, :2].sum(axis=0)
        return int(n), int(k)

    def _planned(self, planned: int) -> int:
        return max(planned, len({e.step for e in self._epochs if 0 < e.weight < 1}), 1)

    def _by_step(self, canary: _Table) -> list[list[Period]]:
        steps: dict[int, list[Period]] = {}
        for epoch, period in zip(self._epochs, self._periods(canary), strict=True):
            if 0 < epoch.weight < 1:
                steps.setdefault(epoch.step, []).append(period)
        return [steps[step] for step in sorted(steps)]

    def _periods(self, canary: _Table) -> list[Period]:
        in_canary, in_stable = design_effect(canary), self._in_stable
        # The weights that each arm's units have in ρ, before they are worth less in clusters.
        to_canary, to_stable = canary[:, 0], self._stable[:, 0]
        if self._assigned:
            weights = np.array([e.weight for e in self._epochs])
            left = canary[:, 0] / np.maximum(self._whole[:, 0], 1.0)
            to_canary, to_stable = weights * left, 1.0 - weights
        to_canary, to_stable = to_canary / in_canary, to_stable / in_stable
        rho = to_canary / np.maximum(to_canary + to_stable, 1e-300)
        return [
            Period(
                float(rho[i]) if 0 < epoch.weight < 1 else 0.0,
                _effective(canary[i], float(in_canary[i])),
                _effective(self._stable[i], float(in_stable[i])),
            )
            for i, epoch in enumerate(self._epochs)
        ]


def witnesses(units: Mapping[str, float]) -> tuple[str, ...]:
    """Of replicas with so many units each, those that have seen enough; none if it is only one."""
    fair = sum(units.values()) / max(len(units), 1)
    names = tuple(name for name, n in units.items() if n > 0 and n >= WITNESS * fair)
    return names if len(names) > 1 else ()


def _effective(row: NDArray[np.float64], effect: float) -> ArmCounts:
    return ArmCounts(n=float(row[0]) / effect, k=float(row[1]) / effect)


def tables(
    epochs: Sequence[Epoch], rows: Sequence[Mapping[str, ArmCountsRow]], count: Count
) -> dict[str, _Table]:
    """By replica, its tallies in every epoch: (epochs, 4)."""
    return {
        name: np.array(
            [
                count(epoch, row[name]) if name in row else NOTHING
                for epoch, row in zip(epochs, rows, strict=True)
            ],
            np.float64,
        )
        for name in sorted({name for row in rows for name in row})
    }


def total(replicas: Mapping[str, _Table], epochs: int) -> _Table:
    """The tallies of all replicas together: (epochs, 4)."""
    return sum(replicas.values(), np.zeros((epochs, 4)))


def _args(null: Null) -> tuple[float, float]:
    return null.r0, null.delta
