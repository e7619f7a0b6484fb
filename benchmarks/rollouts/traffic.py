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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from serving.core.rollout_baseline import latency_bounds
from serving.core.rollout_counts import LATENCY_BOUNDS, ArmCountsRow, Histogram
from serving.core.rollout_spec import RolloutSpec, default_plan

Array: TypeAlias = NDArray[np.float64]
Scenario = Literal["independent", "diurnal", "batches", "sticky", "slow-canary", "slow-stable"]

SCENARIOS: Final[tuple[Scenario, ...]] = get_args(Scenario)
RATES: Final = (1.0, 10.0, 200.0, 2000.0)
BASE_ERRORS: Final = (0.0, 0.001, 0.005, 0.02)

# Shares of predictions in the ten most frequent classes, and in all others.
PREDICTED: Final = np.array([0.22, 0.16, 0.12, 0.10, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.07])
EVENTS: Final = ("errors", "tail", "body", "labels")
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
_DAY_S: Final = 3600.0  # a day's drift, pressed into an hour


@dataclass(frozen=True, slots=True)
class Fault:
    """How the canary is worse, from the beginning of a step on; factors of 1 are healthy."""

    errors: float = 1.0
    latency: float = 1.0
    disagreement: float = 1.0
    from_step: int = 0


@dataclass(frozen=True)
class Plan:
    """A plan as blocks: `lengths_s` of its steps, `block_s` of each step's blocks, in seconds."""

    spec: RolloutSpec
    block_s: tuple[tuple[int, ...], ...]

    @cached_property
    def lengths_s(self) -> tuple[int, ...]:
        """How long each step takes."""
        return tuple(sum(blocks) for blocks in self.block_s)

    @cached_property
    def step(self) -> NDArray[np.intp]:
        """Of every block, the index of its step."""
        return np.repeat(np.arange(len(self.block_s)), [len(blocks) for blocks in self.block_s])

    @cached_property
    def last(self) -> NDArray[np.intp]:
        """Of every step, its last block."""
        return np.cumsum([len(blocks) for blocks in self.block_s]) - 1

    @cached_property
    def seconds(self) -> NDArray[np.int64]:
        """Of every block, how long it is."""
        return np.concatenate(self.block_s)

    @cached_property
    def begin(self) -> NDArray[np.int64]:
        """Of every block, when it begins."""
        return self.seconds.cumsum() - self.seconds

    @cached_property
    def weights(self) -> Array:
        """Of every step, the canary's share."""
        return np.array([step.weight / 100 for step in self.spec.steps])

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.step)

    def starts_s(self, step: int) -> int:
        """When a step begins."""
        return sum(self.lengths_s[:step])

    @classmethod
    def of(cls, spec: RolloutSpec, lengths_s: Sequence[float], rate: float) -> Plan:
        """Steps of these lengths, in blocks that fit the rate of requests."""
        return cls(spec, tuple(_blocks(length, rate) for length in lengths_s))


def _blocks(length_s: float, rate: float) -> tuple[int, ...]:
    """Short blocks at first, when most is still possible; longer ones where less happens."""
    usual = 60 if rate < 10 else 30 if rate < 100 else 20
    first = () if rate < 100 else (5, 5, 10)
    rest = max(round((length_s - sum(first)) / usual), 0)
    return (*first, *[usual] * rest)


def default_ramp(rate: float) -> Plan:
    """The default plan. A step also waits for its canary requests, for so long as the plan lets it.

    What then pauses for lack of data goes on here, as if a person had resumed it: more to judge.
    """
    spec = default_plan("canary")
    analysis = spec.analysis
    lengths = []
    for step in spec.steps:
        needed = 1.25 * analysis.min_units / (rate * step.weight / 100)
        waits = min(needed, step.hold_s + analysis.on_insufficient_data.after_s)
        lengths.append(max(step.hold_s, waits))
    return Plan.of(spec, lengths, rate)


@dataclass(frozen=True)
class Cell:
    """One kind of traffic: requests a second, stable's share of errors, and how it misbehaves.

    `replicas` is how many the canary has, 1 or 2.
    """

    rate: float
    base_error: float
    scenario: Scenario = "independent"
    fault: Fault = field(default_factory=Fault)
    replicas: int = 2

    @property
    def name(self) -> str:
        """As `--cells` has it: scenario/rate/errors."""
        return f"{self.scenario}/{self.rate:g}/{self.base_error:g}"


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
    for source in range(SOURCES):
        rates = cell.rate * weather.rate * shares[source]
        # A gateway collects batches an arm, whichever replica then runs them.
        arm = rates if source == STABLE else cell.rate * weather.rate * shares[:STABLE].sum(axis=0)
        size = np.minimum(1 + arm * _COLLECT_S, _LARGEST_BATCH)
        batches = rng.poisson(rates * plan.seconds / size)
        requests = batches + rng.poisson(batches * (size - 1))
        for event, share in enumerate(_shares_of_events(cell, plan, source, weather)):
            blocks[..., event, source, :] = _events(
                rng, requests, batches, size, share, together=cell.scenario == "batches"
            )
        blocks[..., 3, source, :] = _labels(rng, requests, weather.errors)
    if cell.scenario == "sticky":
        _first_failures(cell, plan, blocks[..., 0, :, :], rng)
    before = np.zeros((rollouts, len(EVENTS), SOURCES, 4))
    seconds = shadow_pairs(cell, plan.spec)[0]
    size = min(1 + cell.rate * _COLLECT_S, _LARGEST_BATCH)
    batches = rng.poisson(cell.rate * seconds / size, rollouts)
    requests = batches + rng.poisson(batches * (size - 1))
    together = cell.scenario == "batches"
    before[:, 0, STABLE] = _events(rng, requests, batches, size, cell.base_error, together=together)
    return Counts(blocks, before, _predictions(rng, blocks))


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
        if cell.scenario != "diurnal":
            one = np.ones((1, plan.blocks))
            return cls(one, one, one)
        turn = 2 * np.pi * plan.begin / _DAY_S
        waves = np.sin(turn + rng.uniform(0, 2 * np.pi, (3, shape[0], 1)))
        return cls(1 + 0.5 * waves[0], 3.0 ** waves[1], np.exp(0.25 * waves[2]))


def bounds(cell: Cell, plan: Plan) -> tuple[float, float]:
    """The latency bounds (tail, body), in seconds, that the product freezes for such a stable."""
    edges = np.array([0.0, *LATENCY_BOUNDS])
    with np.errstate(divide="ignore"):
        below = sum(
            ndtr(np.log(edges / (MEDIAN_S * slow)) / SPREAD) for slow in _stable_scales(cell)
        ) / len(_stable_scales(cell))
    before = cell.rate * shadow_pairs(cell, plan.spec)[0] or 100_000.0
    counted = np.round(np.diff(below) * max(before, 1000.0)).astype(int)
    latency = Histogram({i: int(n) for i, n in enumerate(counted) if n})
    found = latency_bounds(ArmCountsRow(latency=latency))
    if found is None:
        raise ValueError(f"{cell.name}: no latency bounds for so few answers")
    tail, body = (LATENCY_BOUNDS[i] for i in found)
    return tail, body


def _stable_scales(cell: Cell) -> tuple[float, ...]:
    return (1.0, SLOW_REPLICA) if cell.scenario == "slow-stable" else (1.0,)


def latency_scales(cell: Cell, source: int) -> tuple[float, ...]:
    """How much slower a source is than a healthy replica; several, if it is several replicas."""
    if source == STABLE:
        return _stable_scales(cell)
    return (SLOW_REPLICA if cell.scenario == "slow-canary" and source == 1 else 1.0,)


def _shares_of_events(cell: Cell, plan: Plan, source: int, weather: _Weather) -> list[Array]:
    """Of a source's requests, the share that fails, leaves the tail's bound, and the body's."""
    faulty = (plan.step >= cell.fault.from_step) & (source != STABLE)
    errors = np.minimum(
        cell.base_error * weather.errors * np.where(faulty, cell.fault.errors, 1.0), 1.0
    )
    scale = weather.latency * np.where(faulty, cell.fault.latency, 1.0)
    slow = [
        np.mean(
            [
                ndtr(np.log(MEDIAN_S * own * scale / bound) / SPREAD)
                for own in latency_scales(cell, source)
            ],
            axis=0,
        )
        for bound in bounds(cell, plan)
    ]
    return [errors, *slow]


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
    answered = blocks[..., 0, :, 0] - blocks[..., 0, :, 1]
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


def _first_failures(cell: Cell, plan: Plan, errors: Array, rng: np.random.Generator) -> None:
    """Failures belong to users, some of whom always fail: each counts once an arm and step."""
    users = _USERS_PER_RPS * cell.rate
    start = plan.begin - np.array([plan.starts_s(step) for step in plan.step])
    new = _seen(start + plan.seconds) - _seen(start)
    faulty = np.where(plan.step >= cell.fault.from_step, cell.fault.errors, 1.0)
    weight = plan.weights[plan.step]
    for source, part in enumerate(_by_source(cell, weight)):
        share = cell.base_error * (1.0 if source == STABLE else faulty)
        bad = rng.poisson(users * part * np.minimum(share, 1.0), errors.shape[:2])
        # One number of bad users a step: the one drawn for its first block.
        first = np.searchsorted(plan.step, plan.step)
        failed = np.minimum(rng.poisson(bad[:, first] * new), errors[..., source, 2])
        errors[..., source, 1] = errors[..., source, 3] = failed


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
