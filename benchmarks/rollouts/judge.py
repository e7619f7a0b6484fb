"""The product's statistical triggers over many rollouts at once.

`log_e` does for arrays what `serving.core.two_arms.Comparison` does for one rollout, out of the
same parts (`design_effect`, `log_growth`); a test compares both, and the whole verdict, on random
counts. `ceiling` is a cheap number that the log e-value does not exceed: what stays below its
threshold need not be looked at more closely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.rollouts.cells import Array
from benchmarks.rollouts.traffic import PREDICTED, STABLE, Counts
from serving.core.clusters import design_effect
from serving.core.evidence import log_growth, log_threshold
from serving.core.one_arm import BAKE, STEPS
from serving.core.rollout_spec import Analysis
from serving.core.triggers import BODY, MARGINS
from serving.core.two_arms import WITNESS, Null

# The ceiling holds but for rounding, and for events that arrive in an order it did not think of.
_MARGIN: Final = 0.5
_LARGEST: Final = 60.0


@dataclass(frozen=True)
class Bet:
    """One two-arm comparison: which event or class, against which null, with which ρ."""

    event: int
    null: Null
    assigned: bool


@dataclass(frozen=True)
class Judge:
    """A trigger: the average of its bets; `witnesses` sets each canary replica aside in turn.

    Only drift, which counts predictions, does without them. `bakes`: part of its budget is for the
    bake, which has not begun here.
    """

    name: str
    bets: tuple[Bet, ...]
    threshold: float
    witnesses: bool
    bakes: bool
    min_units: int
    min_events: int

    def blocks(self, counts: Counts) -> Array:
        """What it counts: (rollouts, blocks, bets, sources, columns)."""
        if not self.witnesses:
            return counts.predictions
        first, last = self.bets[0].event, self.bets[-1].event
        return counts.blocks[:, :, first : last + 1]

    def before(self, counts: Counts) -> Array:
        """Likewise before the first step: (rollouts, bets, 3, 4)."""
        if not self.witnesses:
            return np.zeros((len(counts.before), len(self.bets), STABLE + 1, 4))
        first, last = self.bets[0].event, self.bets[-1].event
        return counts.before[:, first : last + 1]


def judges(analysis: Analysis) -> tuple[Judge, ...]:
    """The two-arm triggers of a plan."""
    found = []
    for trigger in analysis.triggers:
        null = Null(trigger.r0, trigger.delta)
        bets = {
            "errors": (Bet(0, null, assigned=True),),
            "latency": (Bet(1, null, assigned=False), Bet(2, BODY, assigned=False)),
            "labels": (Bet(3, null, assigned=False),),
            "drift": tuple(Bet(i, null, assigned=False) for i in range(len(PREDICTED))),
        }.get(trigger.kind)
        if bets is not None:
            found.append(
                Judge(
                    trigger.name,
                    bets,
                    log_threshold(trigger.weight, analysis.alpha),
                    witnesses=trigger.kind != "drift",
                    bakes=trigger.kind in MARGINS,
                    min_units=analysis.min_units,
                    min_events=analysis.min_events,
                )
            )
    return tuple(found)


def fails(judge: Judge, table: Array, weights: Array) -> tuple[Array, NDArray[np.bool_]]:
    """The log e-value, and whether the trigger fails; each (items,).

    `table` has shape (items, bets, 3, epochs, 4), its first epoch at weight 0; `weights` (epochs,).
    """
    canary = table[:, :, :STABLE].sum(axis=2)
    whole = log_mean(log_e(judge, table, canary, weights), axis=1)
    evidence = whole
    if judge.witnesses:
        without = [
            log_mean(log_e(judge, table, canary - table[:, :, replica], weights), axis=1)
            for replica in range(STABLE)
        ]
        units = table[:, 0, :STABLE, 1:, 0].sum(axis=-1)
        heard = (units > 0) & (units >= WITNESS * units.sum(axis=1, keepdims=True) / STABLE)
        evidence = np.where(heard.all(axis=1), np.minimum(whole, np.minimum(*without)), whole)
    if judge.bakes:
        evidence = np.logaddexp(np.log(STEPS) + evidence, np.log(BAKE))
    enough = canary[:, 0, 1:, 0].sum(axis=-1) >= judge.min_units
    clusters = canary[..., 1:, :].sum(axis=-2)[..., [1, 3]].min(axis=-1)
    if judge.witnesses:
        apart = clusters.max(axis=1)
    else:
        grown = log_e(judge, table, canary, weights)
        apart = np.take_along_axis(clusters, grown.argmax(axis=1)[:, np.newaxis], 1)[:, 0]
    return evidence, (evidence >= judge.threshold) & enough & (apart >= judge.min_events)


def log_e(judge: Judge, table: Array, canary: Array, weights: Array) -> Array:
    """Log e-values (items, bets) of `canary` (items, bets, epochs, 4), all of it or a part."""
    whole, stable = table[:, :, :STABLE].sum(axis=2), table[:, :, STABLE]
    in_canary, in_stable = design_effect(canary), design_effect(stable)
    found = np.empty(canary.shape[:2])
    opened = slice(1, None)  # the first epoch is at weight 0
    for i, bet in enumerate(judge.bets):
        to_canary, to_stable = canary[:, i, :, 0], stable[:, i, :, 0]
        if bet.assigned:
            left = to_canary / np.maximum(whole[:, i, :, 0], 1.0)
            to_canary, to_stable = weights * left, np.broadcast_to(1 - weights, left.shape)
        to_canary, to_stable = to_canary / in_canary[:, i], to_stable / in_stable[:, i]
        rho = (to_canary / np.maximum(to_canary + to_stable, 1e-300))[:, opened]
        counts = np.concatenate(
            [
                canary[:, i, opened, :2] / in_canary[:, i, opened, np.newaxis],
                stable[:, i, opened, :2] / in_stable[:, i, opened, np.newaxis],
            ],
            axis=-1,
        )
        evidence = (rho > 0) & (rho < 1)
        growth = log_growth(np.where(evidence, rho, 0.5), counts, bet.null.r0, bet.null.delta)
        growth *= evidence[..., np.newaxis]
        copies = log_mean(growth[:, ::-1].cumsum(axis=1)[:, ::-1], axis=-1)
        found[:, i] = log_mean(copies, axis=-1)
    return found


def log_mean(logs: Array, axis: int) -> Array:
    """Logarithm of the mean of what `logs` are logarithms of."""
    largest = logs.max(axis=axis, keepdims=True)
    mean = np.exp(logs - largest).mean(axis=axis)
    found: Array = largest.squeeze(axis) + np.log(mean)
    return found


def growth_ceiling(bet: Bet, weight: Array, canary: Array, stable: Array) -> Array:
    """What the best stake gains over one epoch at most, whatever the design effects; (…,).

    `canary` and `stable` are (…, 2): units and events. Fewer effective units of the same rates are
    less evidence, so the counts as they are bound it.
    """
    n, k, m, j = canary[..., 0], canary[..., 1], stable[..., 0], stable[..., 1]
    if not bet.assigned:
        weight = n / np.maximum(n + m, 1.0)
    weight = np.broadcast_to(weight, n.shape)
    found = np.zeros(n.shape)
    open_ = (weight > 0) & (weight < 1) & (k > 0)
    safe = np.where(open_, weight, 0.5)
    # The sum of Z − δ must be positive, or no stake gains.
    drift = (
        k / safe
        - bet.null.r0 * j / (1 - safe)
        - bet.null.delta * np.minimum(n / safe, m / (1 - safe))
    )
    at = np.nonzero(open_ & (drift > 0))
    counts = np.stack([n[at], k[at], m[at], j[at]], axis=-1)
    grown = log_growth(safe[at], counts, bet.null.r0, bet.null.delta).max(axis=-1, initial=0.0)
    found[at] = np.minimum(grown, _LARGEST)
    return found


def possible(
    judge: Judge, closed: Array, current: Array, step: NDArray[np.intp], planned: int
) -> NDArray[np.bool_]:
    """Whether the trigger may fail, by `growth_ceiling`s.

    `current` (items, bets) is of the running epoch, `closed` (items, bets, steps) of all epochs as
    wholes, and `step` (items,) says which is running.
    """
    steps = np.arange(planned)
    needed = judge.threshold - _MARGIN
    reached: NDArray[np.bool_] = current.max(axis=1) > 0
    reached |= (closed.max(axis=1) * (steps < step[:, np.newaxis])).max(axis=1) > 0
    at = np.nonzero(reached)[0]
    running = step[at][:, np.newaxis, np.newaxis]
    past = np.where(steps < running, closed[at], 0.0)
    from_step_on = past[..., ::-1].cumsum(axis=-1)[..., ::-1] + current[at][..., np.newaxis]
    copies = np.exp(np.minimum(np.where(steps <= running, from_step_on, 0.0), _LARGEST))
    reached[at] = np.log(copies.mean(axis=(1, 2))) >= needed
    return reached
