"""Simulated traffic of many rollouts at once, as the counts that gateways would report.

Everything is an array over trials, so that a thousand rollouts take seconds. `log_e` is
`two_arms.Comparison.log_e` over all trials at once; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.core.clusters import design_effect
from serving.core.evidence import log_growth

Array = NDArray[np.float64]

# Seconds at each weight: a plan in small, as false alarms are a matter of looks, not of minutes.
PLAN = ((0.01, 60), (0.05, 80), (0.25, 80), (0.5, 80))


@dataclass(frozen=True)
class Events:
    """How an event befalls requests: each for itself, or its batch as a whole (`shared` of it)."""

    stable: float
    canary: float
    shared: float = 0.0
    canary_batch: int = 1
    stable_batch: int = 32
    # What one of two replicas of the canary suffers on top, as a machine does.
    one_replica: float | None = None
    drift: Callable[[int], float] = field(default=lambda second: 1.0)


def seconds(
    rng: np.random.Generator,
    trials: int,
    rate: float,
    events: Events,
    plan: tuple[tuple[float, int], ...] = PLAN,
) -> Iterator[tuple[int, int, Array, Array]]:
    """Each second's (time, step, canary, stable): cumulative, (trials, replicas, epochs, 4)."""
    replicas = 1 if events.one_replica is None else 2
    canary = np.zeros((trials, replicas, len(plan), 4))
    stable = np.zeros((trials, 1, len(plan), 4))
    now = 0
    for step, (weight, length) in enumerate(plan):
        for _ in range(length):
            now += 1
            drift = events.drift(now)
            total = rng.poisson(rate, trials)
            to_canary = rng.binomial(total, weight)
            one = rng.binomial(to_canary, 0.5) if replicas == 2 else to_canary
            for replica, n in enumerate((one, to_canary - one)[:replicas]):
                on_top = events.one_replica if replica == 0 else None
                p = on_top if on_top is not None else events.canary * drift
                canary[:, replica, step] += batches(rng, n, p, events.shared, events.canary_batch)
            p = events.stable * drift
            rest = total - to_canary
            stable[:, 0, step] += batches(rng, rest, p, events.shared, events.stable_batch)
            yield now, step, canary, stable


def batches(
    rng: np.random.Generator, n: NDArray[np.int64], p: float, shared: float, size: int
) -> Array:
    """(trials, 4): `n` requests in batches of `size`, each failing with probability `p`."""
    full, rest = n // size, n % size
    count = full + (rest > 0)
    whole = rng.binomial(full, p * shared)
    partly = (rng.random(n.shape) < p * shared) & (rest > 0)
    single = rng.binomial(n - whole * size - partly * rest, p * (1 - shared))
    left = count - whole - partly
    # In how many of the batches left the single ones lie: the mean, as failures are few.
    spread = np.round(left * (1 - (1 - 1 / np.maximum(left, 1)) ** single))
    in_batches = np.minimum(np.maximum(spread, single > 0), single)
    return np.stack(
        [n, whole * size + partly * rest + single, count, whole + partly + in_batches], axis=-1
    ).astype(np.float64)


def sticky(
    rng: np.random.Generator, trials: int, rate: float, base: float, users: int = 1000
) -> Iterator[tuple[int, int, Array, Array]]:
    """As `seconds`, of users who stick to their arm: only the first failure of each counts.

    Some users send a hundred times more than others, and one in twenty fails all the time.
    """
    canary = np.zeros((trials, 1, len(PLAN), 4))
    stable = np.zeros((trials, 1, len(PLAN), 4))
    busy = rng.pareto(1.2, (trials, users)) + 0.1
    busy *= rate / busy.sum(axis=1, keepdims=True)
    chronic = rng.random((trials, users)) < 0.05
    hazard = busy * np.where(chronic, 0.5, base)
    first = np.ceil(rng.exponential(1 / hazard))
    point = rng.random((trials, users))
    now = 0
    for step, (weight, length) in enumerate(PLAN):
        in_canary = point < weight
        for _ in range(length):
            now += 1
            failing = first == now
            for arm, members in ((canary, in_canary), (stable, ~in_canary)):
                n = rng.poisson((busy * members).sum(axis=1))
                k = np.minimum((failing & members).sum(axis=1), n)
                arm[:, 0, step] += np.stack([n, k, n, k], axis=-1)
            yield now, step, canary, stable


def log_e(
    canary: Array,
    stable: Array,
    weights: Array,
    planned: int,
    r0: float,
    delta: float,
    *,
    assigned: bool = True,
) -> Array:
    """(trials,): the least log e-value over the canary with all its replicas, or without one.

    `canary` and `stable` are (trials, replicas, epochs, 4), one epoch a step.
    """
    whole = canary.sum(axis=1)
    total = stable.sum(axis=1)
    results = [_log_e(whole, whole, total, weights, planned, r0, delta, assigned)]
    if canary.shape[1] > 1:
        for replica in range(canary.shape[1]):
            rest = whole - canary[:, replica]
            results.append(_log_e(rest, whole, total, weights, planned, r0, delta, assigned))
    return np.min(results, axis=0)


def _log_e(
    canary: Array,
    whole: Array,
    stable: Array,
    weights: Array,
    planned: int,
    r0: float,
    delta: float,
    assigned: bool,
) -> Array:
    in_canary, in_stable = design_effect(canary), design_effect(stable)
    if assigned:
        to_canary = weights * canary[..., 0] / np.maximum(whole[..., 0], 1) / in_canary
        to_stable = (1 - weights) / in_stable
    else:
        to_canary, to_stable = canary[..., 0] / in_canary, stable[..., 0] / in_stable
    rho = to_canary / np.maximum(to_canary + to_stable, 1e-300)
    known = (rho > 0) & (rho < 1)
    counts = np.stack(
        [
            canary[..., 0] / in_canary,
            canary[..., 1] / in_canary,
            stable[..., 0] / in_stable,
            stable[..., 1] / in_stable,
        ],
        axis=-1,
    )
    growth = log_growth(np.where(known, rho, 0.5), counts * known[..., np.newaxis], r0, delta)
    copies = np.zeros((len(canary), planned))
    copies[:, : growth.shape[1]] = _log_mean(growth[:, ::-1].cumsum(axis=1))
    return _log_mean(copies)


def _log_mean(logs: Array) -> Array:
    most = logs.max(axis=-1, keepdims=True)
    return most[..., 0] + np.log(np.exp(logs - most).mean(axis=-1))


def detections(
    traffic: Iterator[tuple[int, int, Array, Array]],
    trials: int,
    plan: tuple[tuple[float, int], ...],
    threshold: float,
    bets: tuple[tuple[float, float], ...] = ((1.5, 0.001),),
    *,
    assigned: bool = True,
) -> Array:
    """(trials,): the second at which a bet's evidence first reached the threshold, or infinity."""
    weights = np.array([weight for weight, _ in plan])
    at = np.full(trials, np.inf)
    for now, step, canary, stable in traffic:
        upto = slice(0, step + 1)
        seen = canary[:, :, upto].sum(axis=(1, 2))
        # The guards of a plan: 50 units, 3 events that came apart.
        open_ = (seen[:, 0] >= 50) & (np.minimum(seen[:, 1], seen[:, 3]) >= 3) & np.isinf(at)
        if open_.any():
            found = [
                log_e(
                    canary[open_][:, :, upto],
                    stable[open_][:, :, upto],
                    weights[upto],
                    len(plan),
                    *bet,
                    assigned=assigned,
                )
                for bet in bets
            ]
            at[np.flatnonzero(open_)[np.max(found, axis=0) >= threshold]] = now
    return at


@dataclass(frozen=True)
class Moments:
    """Events of requests that are drawn together, `draw` at a time; stable runs two draws as one.

    `share` of all requests have the event. A part `blips` of them have it for the moment they came
    in, of `blip_s` seconds, in whichever arm; of the rest `shared` have it with all of their run.
    """

    share: float
    blips: float = 1.0
    blip_s: float = 0.05
    shared: float = 0.0
    draw: int = 16


def drawn_together(
    rng: np.random.Generator,
    trials: int,
    rate: float,
    moments: Moments,
    plan: tuple[tuple[float, int], ...] = PLAN,
) -> Iterator[tuple[int, int, Array, Array]]:
    """As `seconds`, of requests that are drawn in groups, where both arms are equally good."""
    canary = np.zeros((trials, 1, len(plan), 4))
    stable = np.zeros((trials, 1, len(plan), 4))
    draw = moments.draw
    # Each moment has at least a draw in it.
    in_blip = max(1, round(rate * moments.blip_s / draw))
    blips = moments.share * moments.blips * rate / (in_blip * draw)
    alone = moments.share * (1 - moments.blips)
    now = 0
    for step, (weight, length) in enumerate(plan):
        for _ in range(length):
            now += 1
            total = rng.poisson(rate / draw, trials)
            bad = np.minimum(in_blip * rng.poisson(blips, trials), total)
            for n, failing in ((total - bad, False), (bad, True)):
                to_canary = rng.binomial(n, weight)
                for arm, draws, size in (
                    (canary, to_canary, draw),
                    (stable, n - to_canary, 2 * draw),
                ):
                    p, shared = (1.0, 1.0) if failing else (alone, moments.shared)
                    arm[:, 0, step] += batches(rng, draws * draw, p, shared, size)
            yield now, step, canary, stable
