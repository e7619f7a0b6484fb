"""Rollouts told second by second: the real rules over traffic of a test's choosing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from serving.control.rollout_views import shadow_summary
from serving.core.rollout import command, decide, new_rollout
from serving.core.rollout_counts import (
    ARMS,
    ArmCountsRow,
    ArmName,
    EpochCounts,
    Histogram,
    Sample,
)
from serving.core.rollout_outlook import next_sentence
from serving.core.rollout_spec import (
    Analysis,
    Bake,
    Gate,
    RolloutSpec,
    Shadow,
    Step,
    default_plan,
    default_trigger,
)
from serving.core.rollout_types import ProviderState, Rollout, Snapshot

BEGIN = 1_790_000_000.0
FAST = default_plan("fast")
GATED = replace(FAST, plan="gated", steps=(replace(FAST.steps[0], gate=Gate()), *FAST.steps[1:]))
SAFE = RolloutSpec(
    plan="safe",
    shadow=Shadow(),
    steps=(Step(weight=5, hold_s=300, require_pass=("errors",)), Step(weight=50, hold_s=300)),
    bake=Bake(600),
    analysis=Analysis(
        triggers=(
            *Analysis().triggers,
            replace(default_trigger("promql"), name="saturation", query="load", url="http://p"),
        )
    ),
)


class Traffic:
    """What gateways have counted so far, at `rate` requests a second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.counts: dict[int, EpochCounts] = {}
        self._owed = 0.0  # failures that were too few to be a whole one

    def serve(self, rollout: Rollout, failing: float = 0.0, slower: float = 1.0) -> None:
        """One second of it; `failing` and `slower` are the canary's alone."""
        self._owed += self.rate * rollout.weight * failing
        failed = math.floor(self._owed)
        self._owed -= failed
        stable = _replicas("stable", round(self.rate * (1 - rollout.weight)), 0, 1.0)
        canary = _replicas("canary", round(self.rate * rollout.weight), failed, slower)
        new = EpochCounts(stable, canary, round(self.rate * rollout.shadow))
        self.counts[rollout.epoch] = self.counts.get(rollout.epoch, EpochCounts()) + new

    def total(self, arm: ArmName) -> ArmCountsRow:
        """All that an arm was counted."""
        return sum((c.arm(arm) for c in self.counts.values()), ArmCountsRow())

    def rows(self, rollout: str) -> dict[str, list[dict[str, Any]]]:
        """As a gateway reports it."""
        trials, shadows = [], []
        for epoch, counts in self.counts.items():
            key = {"rollout": rollout, "epoch": epoch}
            for arm, replicas in (("stable", counts.stable), ("canary", counts.canary)):
                trials += [
                    {**key, "arm": arm, "replica": name, **row.to_dict()}
                    for name, row in replicas.items()
                ]
            shadows.append({**key, "pairs": counts.pairs, "disagreements": 0, "dropped": 0})
        return {"trials": trials, "shadows": shadows, "splits": []}


class Story:
    """One rollout of `digits` from version 1 to 2, and the world around it."""

    def __init__(self, spec: RolloutSpec = FAST, *, rate: float = 200.0) -> None:
        self.now = BEGIN
        self.traffic = Traffic(rate)
        self.history: list[Sample] = []
        self.world: dict[str, Any] = {
            "canary_ready": 2,
            "canary_wanted": 2,
            "stable_ready": 2,
            "revision": 1,
            "gateways_at": 1,
        }
        self.rollout: Rollout = new_rollout(
            "digits:1",
            model="digits",
            stable=("1", "sha256:" + "1" * 64),
            canary=("2", "sha256:" + "2" * 64),
            spec=spec,
            salt="salt",
            actor="ada@desk",
            reason="better on sevens",
            now=self.now,
        )

    @property
    def snapshot(self) -> Snapshot:
        """What a tick sees now."""
        return Snapshot(
            now=self.now, counts=self.traffic.counts, history=tuple(self.history), **self.world
        )

    def pass_time(
        self, seconds: int = 1, *, failing: float = 0.0, slower: float = 1.0, **world: Any
    ) -> Story:
        """Let `seconds` pass, a tick each; `failing` and `slower` are the canary's alone."""
        self.world.update(world)
        for _ in range(seconds):
            self.now += 1.0
            self.traffic.serve(self.rollout, failing, slower)
            self.history.append(Sample.of(self.now, self.traffic.counts))
            self.rollout = decide(self.rollout, self.snapshot)
        return self

    def until(self, *states: str, seconds: int = 4000, **world: Any) -> Story:
        """Let time pass until it is in one of `states`."""
        for _ in range(seconds):
            if self.rollout.state in states:
                return self
            self.pass_time(**world)
        raise AssertionError(f"still {self.rollout.state}: {self.rollout.reason}")

    def say(self, name: str, actor: str = "bob@desk", reason: str = "") -> Story:
        """A person's command."""
        self.rollout = command(self.rollout, name, actor, reason, self.now)
        return self

    def answer(self, trigger: str, state: ProviderState) -> Story:
        """What a provider says from now on."""
        self.world["providers"] = {**self.world.get("providers", {}), trigger: state}
        return self

    def to_dict(self) -> dict[str, Any]:
        """As the admin API shows it."""
        return {
            **self.rollout.to_dict(),
            "arms": {arm: self._arm(arm) for arm in ARMS},
            "shadowed": shadow_summary(self.traffic.counts),
            "rollback_ms": None,
            "next": next_sentence(self.rollout, self.snapshot),
        }

    def _arm(self, name: ArmName) -> dict[str, Any]:
        rollout = self.rollout
        total = self.traffic.total(name)
        is_canary = name == "canary"
        answered = total.latency.total
        return {
            "version": rollout.canary if is_canary else rollout.stable,
            "weight": rollout.weight if is_canary else 1 - rollout.weight,
            "ready": self.world[f"{name}_ready"],
            "wanted": 2,
            "requests": total.requests,
            "failed": total.failed,
            "usd_per_1000": None,
            "device_s_per_1000": 1.5 if answered else None,
            "p50_s": total.latency.quantile(0.5) if answered else None,
            "p99_s": total.latency.quantile(0.99) if answered else None,
        }


def _replicas(arm: str, requests: int, failed: int, slower: float) -> dict[str, ArmCountsRow]:
    return {
        f"{arm}#{i}": _answers((requests + i) // 2, (failed + i) // 2, slower) for i in range(2)
    }


def _answers(requests: int, failed: int, slower: float) -> ArmCountsRow:
    """`requests` in batches of one, a fiftieth of them slow."""
    answered = requests - failed
    slow = answered // 50
    shift = round(math.log(slower) / math.log(1.07))
    times = Histogram({60 + shift: answered - slow, 80 + shift: slow})
    return ArmCountsRow(
        requests=requests,
        failed=failed,
        batches=requests,
        failed_batches=failed,
        latency=times,
        batch_latency=times,
    )
