"""What is simulated: a rollout's plan cut into blocks of time, kinds of traffic, and faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from serving.core.rollout_spec import RolloutSpec, default_plan

Array: TypeAlias = NDArray[np.float64]
Scenario = Literal[
    "independent",
    "diurnal",
    "batches",
    "sticky",
    "slow-canary",
    "slow-stable",
    "day",
    "draws",
    "blips",
]

SCENARIOS: Final[tuple[Scenario, ...]] = get_args(Scenario)
RATES: Final = (1.0, 10.0, 200.0, 2000.0)
BUSY_RATES: Final = (2000.0, 20_000.0)
"""Where scenarios of `draws.PARTS` happen: a gateway draws requests together that come at once."""
BASE_ERRORS: Final = (0.0, 0.001, 0.005, 0.02)


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
    def bakes(self) -> bool:
        """Whether its last steps have all requests at the canary."""
        return bool(self.weights[-1] == 1.0)

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
