"""Simulated gateways: they split requests as the table says, and report what they count."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.control.controller import Controller
from serving.core.rollout_counts import LATENCY_BOUNDS
from serving.core.routing import ModelRoute, RouteTable
from tests.control.world import gateway_report, model_row


@dataclass
class Version:
    """How a version behaves: shares of requests, and seconds."""

    failing: float = 0.0
    disagreeing: float = 0.0
    latency_s: float = 0.005
    busy_s: float = 0.001
    wrong: float = 0.0


@dataclass
class Gateway:
    """One gateway process: counts from its start, a copy of the table, a local breaker."""

    name: str
    rng: random.Random
    table: RouteTable = field(default_factory=RouteTable)
    answered: Counter[str] = field(default_factory=Counter)
    trials: dict[tuple[str, int, str, str], dict[str, Any]] = field(default_factory=dict)
    shadows: dict[tuple[str, int], Counter[str]] = field(default_factory=dict)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures_seen_by_clients: int = 0

    def serve(self, requests: int, versions: Mapping[str, Version]) -> None:
        """Take so many requests of every model."""
        for route in self.table.models.values():
            for _ in range(requests):
                self._one(route, versions)

    def _one(self, route: ModelRoute, versions: Mapping[str, Version]) -> None:
        split = route.split
        if split is None:
            arm, version = "", route.version
        else:
            self.splits.setdefault(
                split.rollout,
                {"rollout": split.rollout, "breaker": "closed", "opened": 0, "shielded": 0},
            )
            to_canary = self.rng.random() < split.weight
            if to_canary and not route.arms[split.canary].endpoints:
                arm, version = "", route.version
            else:
                arm = "canary" if to_canary else "stable"
                version = split.canary if to_canary else route.version
        endpoints = route.arms[version].endpoints
        if not endpoints:
            self.failures_seen_by_clients += 1
            return
        behaviour = versions[version]
        failed = self.rng.random() < behaviour.failing
        if arm:
            assert split is not None
            row = self._row(split.rollout, split.epoch, arm, self.rng.choice(endpoints).replica)
            self._count(row, failed, behaviour)
            if arm == "stable" and self.rng.random() < split.shadow:
                pairs = self.shadows.setdefault((split.rollout, split.epoch), Counter())
                pairs["pairs"] += 1
                shadow = versions[split.canary]
                pairs["disagreements"] += self.rng.random() < shadow.disagreeing
        if failed and arm == "canary" and split is not None and split.shield:
            self.splits[split.rollout]["shielded"] += 1
        elif failed:
            self.failures_seen_by_clients += 1
        self.answered[version] += 1

    def _row(self, rollout: str, epoch: int, arm: str, replica: str) -> dict[str, Any]:
        return self.trials.setdefault(
            (rollout, epoch, arm, replica),
            {
                "rollout": rollout,
                "epoch": epoch,
                "arm": arm,
                "replica": replica,
                **dict.fromkeys(("requests", "failed", "batches", "failed_batches", "busy_ns"), 0),
                "latency": Counter(),
                "batch_latency": Counter(),
                "labels": {"n": 0, "k": 0},
            },
        )

    def _count(self, row: dict[str, Any], failed: bool, behaviour: Version) -> None:
        row["requests"] += 1
        row["batches"] += 1
        row["failed"] += failed
        row["failed_batches"] += failed
        if not failed:
            seconds = behaviour.latency_s * self.rng.lognormvariate(0.0, 0.2)
            bucket = str(bisect_left(LATENCY_BOUNDS, seconds))
            row["latency"][bucket] += 1
            row["busy_ns"] += int(1e9 * behaviour.busy_s * self.rng.lognormvariate(0.0, 0.2))
            row["batch_latency"][bucket] += 1
            row["labels"]["n"] += 1
            row["labels"]["k"] += self.rng.random() < behaviour.wrong

    def report(self) -> dict[str, Any]:
        """Totals since the start, as plain data that does not change later."""
        trials = [
            {
                **row,
                "latency": dict(row["latency"]),
                "batch_latency": dict(row["batch_latency"]),
                "labels": dict(row["labels"]),
            }
            for row in self.trials.values()
        ]
        shadows = [
            {"rollout": rollout, "epoch": epoch, **pairs}
            for (rollout, epoch), pairs in self.shadows.items()
        ]
        rollouts = {
            "trials": trials,
            "shadows": shadows,
            "splits": [dict(row) for row in self.splits.values()],
        }
        models = [model_row(version, n) for version, n in sorted(self.answered.items())]
        return gateway_report(self.name, self.table.revision, models, rollouts=rollouts)


@dataclass
class Traffic:
    """Several gateways with the same clients."""

    seed: int = 0
    requests_s: int = 40
    gateways: int = 2
    versions: dict[str, Version] = field(
        default_factory=lambda: {v: Version() for v in ("1", "2", "3")}
    )

    def __post_init__(self) -> None:
        self.fleet = [
            Gateway(f"g{n}", random.Random(f"{self.seed}/{n}")) for n in range(self.gateways)
        ]

    def second(self, controller: Controller) -> None:
        """One second of requests; then gateways report, and take over the table."""
        for gateway in self.fleet:
            gateway.serve(self.requests_s // self.gateways, self.versions)
            gateway.table = controller.board.table
            controller.report(gateway.report())

    @property
    def failures_seen_by_clients(self) -> int:
        return sum(g.failures_seen_by_clients for g in self.fleet)
