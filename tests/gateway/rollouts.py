"""A rollout at a gateway without controller: two versions, a split between them, and its counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.core.rollout_counts import ArmCountsRow, EpochCounts, add_up
from serving.core.routing import Split
from tests.gateway.client import Client, Reply, infer
from tests.gateway.harness import Gateway, Replica, ReplicaProcess, arm

ROLLOUT = "rollout-1"
SALT = "a salt"


class Rollout:
    """Version 1 of m at `stable`, version 2 at `canary`; `begin` puts a split in force."""

    def __init__(
        self, gateway: Gateway, stable: Replica, *canary: Replica | ReplicaProcess
    ) -> None:
        self.gateway = gateway
        self.stable = stable
        self.canary = canary[0]
        self.canaries: Sequence[Replica | ReplicaProcess] = canary
        self.limits: dict[str, Any] = {}
        # Of the canary, where they differ.
        self.canary_limits: dict[str, Any] = {}

    def begin(self, weight: float = 1.0, epoch: int = 1, *, ready: bool = True, **of: Any) -> None:
        """Publish a split; `of` are more of its fields."""
        split = Split(ROLLOUT, epoch, "2", weight, SALT, **of)
        limits = self.limits
        self.gateway.publish(
            arm("m", [self.stable], version="1", of=self.stable.signature, **limits),
            arm(
                "m",
                self.canaries,
                version="2",
                of=self.stable.signature,
                role="canary",
                **{**limits, **self.canary_limits},
            ),
            split=split,
            ready=ready,
        )

    def end(self, version: str = "1") -> None:
        """Publish a table with one version and no split."""
        replicas = [self.stable] if version == "1" else self.canaries
        self.gateway.publish(
            arm("m", replicas, version=version, of=self.stable.signature, **self.limits)
        )

    def report(self) -> dict[str, list[dict[str, Any]]]:
        return self.gateway.run(self.gateway.server.routes.report_rollouts)

    def counts(self, epoch: int = 1) -> EpochCounts:
        """What is reported for an epoch, read as the controller reads it."""
        report = self.report()
        totals = add_up([*report["trials"], *report["shadows"]]).get(ROLLOUT, {})
        return totals.get(epoch, EpochCounts())

    def stable_counts(self, epoch: int = 1) -> ArmCountsRow:
        return self.counts(epoch).arm("stable")

    def canary_counts(self, epoch: int = 1) -> ArmCountsRow:
        return self.counts(epoch).arm("canary")

    def summary(self) -> dict[str, Any]:
        """What is reported of the split itself."""
        (summary,) = self.report()["splits"]
        return summary


def arm_of(client: Client, *headers: str, value: float = 1, **members: Any) -> str:
    """The arm that answers a request, which must succeed."""
    return answered_by(client.ask(infer("m", value, headers=headers, **members)))


def answered_by(reply: Reply) -> str:
    assert reply.status == 200, reply
    role, version = reply.headers["x-arm"], reply.headers["x-model-version"]
    assert reply.json["model_version"] == version
    assert (role, version) in {("stable", "1"), ("canary", "2")}
    return role
