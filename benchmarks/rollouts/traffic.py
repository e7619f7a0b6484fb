"""What gateways would have counted in many rollouts at once, drawn at random.

Time is cut into blocks of some seconds. A block's totals are drawn first; the few blocks in
which a verdict could change are then split into seconds (`split`), given their totals. Both
together have the distribution of counts drawn second by second, at a fraction of the cost.

Counts are arrays (…, 3, 4): by source (the canary's two replicas, and stable), requests, those with
the event, batches, those with the event. `EVENTS` names the kinds of events. Predictions are not
counted by replica nor by batch: there the arrays are (…, 2, 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from benchmarks.rollouts import draws
from benchmarks.rollouts.cells import Array, Cell, Plan, Scenario
from serving.core.rollout_baseline import ALONE, BODY, LATEST_ANSWERS, MIN_ANSWERS, TAIL
from serving.core.rollout_counts import LATENCY_BOUNDS
from serving.core.rollout_spec import FLOOR_S, RolloutSpec

# Shares of predictions in the ten most frequent classes, and in all others.
PREDICTED: Final = np.array([0.22, 0.16, 0.12, 0.10, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.07])
EVENTS: Final = ("errors", "tail", "body", "labels", "alone")
SOURCES: Final = 3
NEVER: Final = np.inf
STABLE: Final = 2

MEDIAN_S: Final = 0.02
SPREAD: Final = 0.5  # of the logarithm of latency
SLOW_REPLICA: Final = 2.0
LABELLED: Final = 0.1
WRONG: Final = 0.05
DISAGREEING: Final = 0.01
_COLLECT_S: Final = 0.015  # a batch has what arrives within this time
_LARGEST_BATCH: Final = 32.0
_USERS_PER_RPS: Final = 20.0
_USERS_SPREAD: Final = 1.0  # of the logarithm of a user's rate
_DAY_S: Final[dict[Scenario, float]] = {
    "diurnal": 3600.0,  # a day's drift, pressed into an hour
    "day": 86_400.0,
}


@dataclass(frozen=True)
class Counts:
    """What was drawn: `blocks` (rollouts, blocks, events, 3, 4), `before` (rollouts, events, 3, 4).

    `before` is what stable did while its answers were shadowed, at weight 0. `predictions` is
    (rollouts, blocks, classes, 2, 2).
    """

    blocks: Array
    before: Array
    predictions: Array


def widen(predictions: Array) -> Array:
    """Predictions (…, 2, 2) in the form of other counts (…, 3, 4), a request a batch."""
    found = np.zeros((*predictions.shape[:-2], SOURCES, 4))
    for arm, source in enumerate((0, STABLE)):
        found[..., source, :2] = found[..., source, 2:] = predictions[..., arm, :]
    return found


def draw(cell: Cell, plan: Plan, rollouts: int, rng: np.random.Generator) -> Counts:
    """The counts of `rollouts` rollouts."""
    shape = (rollouts, plan.blocks)
    weather = _Weather.of(cell, plan, shape, rng)
    weight = plan.weights[plan.step]
    shares = np.broadcast_to(_by_source(cell, weight)[:, np.newaxis], (SOURCES, *shape))
    if cell.scenario == "sticky":
        shares = _sticky_shares(cell, plan, rollouts, rng)
    blocks = np.zeros((*shape, len(EVENTS), SOURCES, 4))
    bounds = frozen_bounds(cell, plan, np.broadcast_to(weather.latency, shape), rng)
    parts = [_shares_of_events(cell, plan, s, weather, bounds) for s in range(SOURCES)]
    grouped = cell.scenario in draws.PARTS
    if grouped:
        _draw_together(cell, plan, blocks, shares, parts, rng)
    for source in range(SOURCES):
        if not grouped:
            _draw_one_by_one(cell, plan, blocks, weather, shares, parts[source], source, rng)
        requests = blocks[:, :, 0, source, 0].astype(np.int64)
        blocks[..., 3, source, :] = _labels(rng, requests, weather.errors)
    if cell.scenario == "sticky":
        blocks[..., 0, :, :] = _units(cell, plan, blocks[..., 0, :, 2], rng)
    before = np.zeros((rollouts, len(EVENTS), SOURCES, 4))
    seconds = shadow_pairs(cell, plan.spec)[0]
    size = min(1 + cell.rate * _COLLECT_S, _LARGEST_BATCH)
    batches = rng.poisson(cell.rate * seconds / size, rollouts)
    requests = batches + rng.poisson(batches * (size - 1))
    together = cell.scenario == "batches"
    before[:, 0, STABLE] = _events(rng, requests, batches, size, cell.base_error, together=together)
    return Counts(blocks, before, _predictions(rng, blocks))


def _draw_one_by_one(
    cell: Cell,
    plan: Plan,
    blocks: Array,
    weather: _Weather,
    shares: Array,
    parts: dict[str, Array],
    source: int,
    rng: np.random.Generator,
) -> None:
    """Fill in a source's events: `parts` of its requests, which are drawn each by itself."""
    rates = cell.rate * weather.rate * shares[source]
    # A gateway collects batches an arm, whichever replica then runs them.
    arm = rates if source == STABLE else cell.rate * weather.rate * shares[:STABLE].sum(axis=0)
    size = np.minimum(1 + arm * _COLLECT_S, _LARGEST_BATCH)
    batches = rng.poisson(rates * plan.seconds / size)
    requests = batches + rng.poisson(batches * (size - 1))
    for event, share in parts.items():
        blocks[..., EVENTS.index(event), source, :] = _events(
            rng, requests, batches, size, share, together=cell.scenario == "batches"
        )


def _draw_together(
    cell: Cell,
    plan: Plan,
    blocks: Array,
    shares: Array,
    parts: Sequence[dict[str, Array]],
    rng: np.random.Generator,
) -> None:
    """Fill in all sources' events, where requests are drawn in groups."""
    drawn = draws.divided(rng, (cell.rate * plan.seconds).astype(np.float64), shares)
    for event in parts[0]:
        of_sources = np.stack([np.broadcast_to(of[event], shares.shape[1:]) for of in parts])
        blocks[:, :, EVENTS.index(event)] = draws.counts(
            rng, cell.scenario, cell.rate, drawn, of_sources
        )


def _by_source(cell: Cell, share: Array) -> Array:
    """The canary's share, split among its replicas, and stable's."""
    first = share / cell.replicas
    return np.stack([first, share - first, 1 - share])


def shadow_pairs(cell: Cell, spec: RolloutSpec) -> tuple[float, float]:
    """How long the plan's shadow takes, and how many pairs it compares a second."""
    if spec.shadow is None:
        return 0.0, 0.0
    pairs = cell.rate * spec.shadow.percent / 100
    return min(spec.shadow.min_pairs / pairs, spec.shadow.max_duration_s), pairs


@dataclass(frozen=True)
class _Weather:
    """What changes over time for both arms alike: factors of the rate, errors and latency."""

    rate: Array
    errors: Array
    latency: Array

    @classmethod
    def of(
        cls, cell: Cell, plan: Plan, shape: tuple[int, int], rng: np.random.Generator
    ) -> _Weather:
        if cell.scenario not in _DAY_S:
            one = np.ones((1, plan.blocks))
            return cls(one, one, one)
        turn = 2 * np.pi * plan.begin / _DAY_S[cell.scenario]
        waves = np.sin(turn + rng.uniform(0, 2 * np.pi, (3, shape[0], 1)))
        return cls(1 + 0.5 * waves[0], 3.0 ** waves[1], np.exp(0.25 * waves[2]))


def frozen_bounds(
    cell: Cell, plan: Plan, latency: Array, rng: np.random.Generator
) -> dict[str, Array]:
    """The latency bounds in seconds, by event (rollouts, blocks), frozen at each step's entry.

    By the rule of the product, from what stable answered in the latest steps, or in the shadow;
    `latency` (rollouts, blocks) is the weather's factor. The product also freezes them anew within
    a step where stable's median moves; here they stay. Raises ValueError for too few answers.
    """
    rules = {"tail": TAIL, "body": BODY, **({"alone": ALONE} if plan.bakes else {})}
    found = {event: np.empty((len(latency), plan.blocks)) for event in rules}
    # A plan without a shadow has seen stable before.
    answers = [cell.rate * shadow_pairs(cell, plan.spec)[0] or 100_000.0]
    seen = [np.log(latency[:, 0])]
    for step, length in enumerate(plan.lengths_s):
        enough = np.cumsum(answers[::-1]) >= LATEST_ANSWERS
        first = len(answers) - 1 - int(enough.argmax()) if enough.any() else 0
        counted = round(sum(answers[first:]))
        if counted < MIN_ANSWERS:
            raise ValueError(f"{cell.name}: no latency bounds for so few answers")
        usual = np.exp(np.average(seen[first:], axis=0, weights=answers[first:]))
        here = plan.step == step
        for event, (quantile, factor) in rules.items():
            level = rng.beta(quantile * counted, (1 - quantile) * counted, len(latency))
            base = usual * _stable_quantile(cell, level)
            bound = np.maximum(factor * base, base + FLOOR_S)
            bound = _EDGES[np.searchsorted(_EDGES, bound)]
            # The bake's bound is that of promotion, for what stable did before it too.
            if event != "alone":
                found[event][:, here] = bound[:, np.newaxis]
            elif plan.weights[max(step - 1, 0)] < 1.0:
                found[event][:] = bound[:, np.newaxis]
        answers.append(cell.rate * (1 - plan.weights[step]) * length)
        seen.append(np.log(latency[:, here]).mean(axis=1))
    return found


_EDGES: Final = np.array([*LATENCY_BOUNDS, np.inf])


def _stable_quantile(cell: Cell, level: Array) -> Array:
    """The latency in seconds below which such shares of stable's answers lie."""
    scales = _stable_scales(cell)
    seconds = MEDIAN_S * np.exp(np.linspace(-4, 6, 4000) * SPREAD)
    below = sum(ndtr(np.log(seconds / (MEDIAN_S * slow)) / SPREAD) for slow in scales)
    found: Array = np.interp(level, below / len(scales), seconds)
    return found


def _stable_scales(cell: Cell) -> tuple[float, ...]:
    return (1.0, SLOW_REPLICA) if cell.scenario == "slow-stable" else (1.0,)


def latency_scales(cell: Cell, source: int) -> tuple[float, ...]:
    """How much slower a source is than a healthy replica; several, if it is several replicas."""
    if source == STABLE:
        return _stable_scales(cell)
    return (SLOW_REPLICA if cell.scenario == "slow-canary" and source == 1 else 1.0,)


def _shares_of_events(
    cell: Cell, plan: Plan, source: int, weather: _Weather, bounds: dict[str, Array]
) -> dict[str, Array]:
    """By event, its share of a source's requests: those that fail, or take longer than a bound."""
    faulty = (plan.step >= cell.fault.from_step) & (source != STABLE)
    errors = np.minimum(
        cell.base_error * weather.errors * np.where(faulty, cell.fault.errors, 1.0), 1.0
    )
    scale = weather.latency * np.where(faulty, cell.fault.latency, 1.0)
    slow = {
        event: np.mean(
            [
                ndtr(np.log(MEDIAN_S * own * scale / bound) / SPREAD)
                for own in latency_scales(cell, source)
            ],
            axis=0,
        )
        for event, bound in bounds.items()
    }
    return {"errors": errors, **slow}


def _events(
    rng: np.random.Generator,
    requests: NDArray[np.int64],
    batches: NDArray[np.int64],
    size: Any,
    share: Any,
    *,
    together: bool,
) -> Array:
    """Requests, events, batches, batches with an event. `together`: batches fail as a whole."""
    hit = share if together else 1 - (1 - share) ** size
    failed = rng.binomial(batches, np.broadcast_to(hit, batches.shape))
    # What share of a hit batch's other requests has the event, so that all in all it is `share`.
    others = (size * share - hit) / np.maximum((size - 1) * hit, 1e-12)
    again = np.clip(failed / np.maximum(batches, 1) * others, 0, 1)
    events = failed + rng.binomial(requests - batches, again)
    return np.stack([requests, events, batches, failed], axis=-1).astype(np.float64)


def _labels(rng: np.random.Generator, requests: NDArray[np.int64], drift: Array) -> Array:
    known = rng.binomial(requests, LABELLED)
    wrong = rng.binomial(known, np.broadcast_to(np.minimum(WRONG * drift, 0.5), known.shape))
    return np.stack([known, wrong, known, wrong], axis=-1).astype(np.float64)


def _predictions(rng: np.random.Generator, blocks: Array) -> Array:
    """Of the requests answered, those of each class. Not by replica: drift does not ask for it."""
    tried = attempts(blocks)
    answered = tried[..., 0] - tried[..., 1]
    arms = np.stack([answered[..., 0] + answered[..., 1], answered[..., STABLE]], axis=-1)
    found = np.empty((*arms.shape[:2], len(PREDICTED), 2, 2))
    found[..., 0] = arms[:, :, np.newaxis]
    found[..., 1] = np.swapaxes(rng.multinomial(arms.astype(np.int64), PREDICTED), -1, -2)
    return found


def _sticky_shares(cell: Cell, plan: Plan, rollouts: int, rng: np.random.Generator) -> Array:
    """The sources' shares of requests, by block: with few users, not what the weight says.

    Users differ in how much they send. As the weight grows users move to the canary, none back.
    """
    heavy = np.exp(_USERS_SPREAD**2)
    alike = _USERS_PER_RPS * cell.rate / heavy
    parts = np.diff([0.0, *plan.weights, 1.0])
    mass = rng.gamma(np.maximum(alike * parts, 1e-3), size=(rollouts, len(parts)))
    share = (mass.cumsum(axis=1) / mass.sum(axis=1, keepdims=True))[:, plan.step]
    return _by_source(cell, share)


def _units(cell: Cell, plan: Plan, runs: Array, rng: np.random.Generator) -> Array:
    """Users as they are counted, each once a step, by `runs` (rollouts, blocks, 3): (…, 3, 4).

    Some always fail, the same in every step: as the weight grows they move to the canary, none
    back. A fault makes others fail that are the canary's.
    """
    users = _USERS_PER_RPS * cell.rate
    start = plan.begin - np.array([plan.starts_s(step) for step in plan.step])
    new = _seen(start + plan.seconds) - _seen(start)
    shape = runs.shape[:2]
    by_weight = users * np.diff([0.0, *plan.weights, 1.0])
    bad = rng.poisson(cell.base_error * by_weight, (shape[0], len(by_weight))).cumsum(axis=1)
    in_canary = bad[:, plan.step]
    hurt = np.minimum(cell.base_error * cell.fault.errors, 1.0) - cell.base_error
    weight = plan.weights[plan.step]
    extra = np.where(plan.step >= cell.fault.from_step, hurt * users * weight, 0.0)
    failing = np.moveaxis(_by_source(cell, in_canary + extra), 0, -1)
    failing[..., STABLE] = bad[:, -1:] - in_canary
    well = users * _by_source(cell, weight).T - failing
    failed = rng.poisson(failing * new[:, np.newaxis])
    first = failed + rng.poisson(np.maximum(well, 0.0) * new[:, np.newaxis])
    batches = np.minimum(first, np.maximum(runs, failed))
    counted = [first, failed, batches, np.minimum(failed, batches)]
    return np.stack(counted, axis=-1).astype(np.float64)


def attempts(counts: Array) -> Array:
    """Of counts (…, events, 3, 4), failures out of all requests, not units: (…, 3, 4)."""
    found = counts[..., 0, :, :].copy()
    np.maximum(found[..., ::2], counts[..., 1, :, ::2], out=found[..., ::2])
    return found


def _seen(seconds: NDArray[np.int64]) -> Array:
    """The share of users that has sent a request after so many seconds."""
    quantiles = (np.arange(200) + 0.5) / 200
    users = np.exp(_USERS_SPREAD * ndtri(quantiles) - _USERS_SPREAD**2 / 2) / _USERS_PER_RPS
    seen: Array = 1 - np.exp(-np.multiply.outer(seconds, users)).mean(axis=-1)
    return seen


def split(totals: Array, seconds: int, rng: np.random.Generator) -> Array:
    """Counts (…, 4) of blocks, second by second and cumulated: (…, seconds, 4)."""
    n, k, batches, failed = np.moveaxis(totals.astype(np.int64), -1, 0)
    even = np.full(seconds, 1 / seconds)
    b = rng.multinomial(batches, even)
    with_requests = np.where(batches[..., np.newaxis] > 0, b, 1)
    rest = rng.multinomial(n - batches, with_requests / with_requests.sum(-1, keepdims=True))
    f = _drawn_from(b, failed, rng)
    hit = np.where(failed[..., np.newaxis] > 0, f, 1)
    again = rng.multinomial(k - failed, hit / hit.sum(-1, keepdims=True))
    cumulated = np.stack([b + rest, f + again, b, f], axis=-1).cumsum(axis=-2).astype(np.float64)
    np.minimum(cumulated[..., 1], cumulated[..., 0], out=cumulated[..., 1])
    return cumulated


def split_predictions(totals: Array, seconds: int, rng: np.random.Generator) -> Array:
    """Predictions (…, classes, 2, 2) likewise: (…, classes, 2, seconds, 2)."""
    even = np.full(seconds, 1 / seconds)
    classes = rng.multinomial(totals[..., 1].astype(np.int64), even).cumsum(axis=-1)
    found = np.empty((*classes.shape, 2))
    found[..., 0] = classes.sum(axis=-3, keepdims=True)
    found[..., 1] = classes
    return found


def _drawn_from(
    b: NDArray[np.int64], failed: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """In which seconds the failed batches lie, of those that there are."""
    found = np.zeros_like(b)
    left, among = failed.copy(), b.sum(-1)
    for second in range(b.shape[-1]):
        here = b[..., second]
        found[..., second] = rng.hypergeometric(here, among - here, left)
        left = left - found[..., second]
        among = among - here
    return found
