"""A rollout with a world around it, ticked by hand: the clock, the replicas and the counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from serving.core.rollout import Rollout, Snapshot, State, command, decide, new_rollout
from serving.core.rollout_counts import ArmCountsRow, EpochCounts, Histogram
from serving.core.rollout_facts import CanaryGpu
from serving.core.rollout_outlook import next_sentence
from serving.core.rollout_spec import (
    Analysis,
    Bake,
    RolloutSpec,
    Shadow,
    Step,
    Trigger,
    default_trigger,
)
from serving.core.rollout_types import ProviderState

START = 1_700_000_000.0
OK = ProviderState("ok")
TRIGGERS = (
    default_trigger("errors"),
    default_trigger("latency"),
    default_trigger("disagreement"),
    default_trigger("crash_loop"),
)
QUEUE = Trigger("queue", "promql", action="pause", query="q", url="http://p", threshold=1)


def analysis(*more: Trigger, **changes: Any) -> Analysis:
    return Analysis(triggers=(*TRIGGERS, *more), **changes)


PLAN = RolloutSpec(
    plan="test",
    shadow=Shadow(min_pairs=100, max_duration_s=60),
    steps=(Step(5, 60), Step(50, 60)),
    bake=Bake(120),
    keep_previous_s=300,
    ready_timeout_s=100,
    analysis=analysis(),
)


def start(spec: RolloutSpec = PLAN) -> Rollout:
    return new_rollout(
        "r1",
        model="digits",
        stable=("1", "sha-1"),
        canary=("2", "sha-2"),
        spec=spec,
        salt="salt",
        actor="ada",
        reason="apply",
        now=START,
    )


@dataclass
class World:
    """`tick` runs one decision a second; requests go by the rollout's weight."""

    rollout: Rollout = field(default_factory=start)
    now: float = START
    rate: int = 200
    canary_ready: int = 2
    canary_wanted: int = 2
    canary_failed: str = ""
    stable_ready: int = 2
    canary_fails: float = 0.0
    latency_bucket: int = 60
    canary_slower: int = 0
    lagging: bool = False
    providers: dict[str, ProviderState] = field(default_factory=dict)
    restarts: tuple[float, ...] = ()
    gpus: tuple[CanaryGpu, ...] = ()
    counts: dict[int, EpochCounts] = field(default_factory=dict)

    def snapshot(self) -> Snapshot:
        revision = self.rollout.epoch + 1
        return Snapshot(
            now=self.now,
            canary_ready=self.canary_ready,
            canary_wanted=self.canary_wanted,
            canary_failed=self.canary_failed,
            stable_ready=self.stable_ready,
            revision=revision,
            gateways_at=revision - self.lagging,
            counts=dict(self.counts),
            providers=self.providers,
            restarts=self.restarts,
            gpus=self.gpus,
        )

    def traffic(self, seconds: float) -> None:
        """What gateways count in that time, at the weight that the routes carry."""
        rollout, total = self.rollout, int(self.rate * seconds)
        canary, late = round(total * rollout.weight), self.canary_slower
        pairs = round((total - canary) * rollout.shadow)
        row = EpochCounts(
            stable={"s": self._answers(total - canary, 0)},
            canary={
                "a": self._answers(canary // 2, round(canary // 2 * self.canary_fails), late),
                "b": self._answers(
                    canary - canary // 2, round(canary // 2 * self.canary_fails), late
                ),
            },
            pairs=pairs,
        )
        self.counts[rollout.epoch] = self.counts.get(rollout.epoch, EpochCounts()) + row

    def _answers(self, n: int, failed: int, late: int = 0) -> ArmCountsRow:
        bucket = self.latency_bucket + late
        latency = Histogram({bucket: n - failed}) if n > failed else Histogram()
        return ArmCountsRow(n, failed, n, failed, latency, latency)

    def tick(self, seconds: float = 1.0) -> Rollout:
        self.now += seconds
        if self.rollout.state not in (State.PENDING, State.PREPARING):
            self.traffic(seconds)
        self.rollout = decide(self.rollout, self.snapshot())
        return self.rollout

    def until(self, found: State | Callable[[Rollout], bool], within: float = 2000) -> Rollout:
        for _ in range(int(within)):
            if (self.rollout.state is found) if isinstance(found, State) else found(self.rollout):
                return self.rollout
            self.tick()
        raise AssertionError(
            f"still {self.rollout.state}: {next_sentence(self.rollout, self.snapshot())}"
        )

    def to(self, state: State, step: int | None = None) -> World:
        self.until(lambda r: r.state is state and (step is None or r.step == step))
        return self

    def say(self, name: str, reason: str = "because") -> Rollout:
        self.rollout = command(self.rollout, name, "grace", reason, self.now)
        return self.rollout

    @property
    def next(self) -> str:
        return next_sentence(self.rollout, self.snapshot())


def world(spec: RolloutSpec = PLAN, **changes: Any) -> World:
    return World(rollout=start(spec), **changes)


def plan(**changes: Any) -> RolloutSpec:
    return replace(PLAN, **changes)


def stored(rollout: Rollout) -> Rollout:
    """What comes back from the store."""
    return Rollout.from_dict(json.loads(json.dumps(rollout.to_dict())))
