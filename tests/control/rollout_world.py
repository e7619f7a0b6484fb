"""A world with traffic in it, and what must hold in it at every moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serving.control.controller import Controller
from serving.control.records import Record
from serving.core.rollout_types import Outcome
from serving.store.sql import Store
from tests.control.traffic import Traffic
from tests.control.world import World

QUICK: dict[str, Any] = {
    "plan": "fast",
    "shadow": {"percent": 50, "min_pairs": 20, "max_duration": 6},
    "steps": [{"weight": 20, "hold": 3}, {"weight": 50, "hold": 3}],
    "bake": {"duration": 4},
    "keep_previous": 8,
    "ready_timeout": 20,
    "analysis": {"min_units": 8},
}


@dataclass
class RolloutWorld(World):
    """One model "m"; `second` is one second of everything."""

    traffic: Traffic = field(default_factory=Traffic)
    look: Callable[[Controller], None] = lambda _: None

    async def second(self, controller: Controller) -> None:
        self.monotonic += 1.0
        self.announce(controller)
        self.traffic.second(controller)
        await controller.step(look=True)
        check(controller)
        self.look(controller)

    async def seconds(self, controller: Controller, count: int) -> None:
        for _ in range(count):
            await self.second(controller)

    async def until(
        self, controller: Controller, state: str, *, at_most: int = 90, key: str = "m"
    ) -> Record:
        """Let time pass until the newest rollout of the model is in `state`."""
        for _ in range(at_most):
            record = await controller.rollouts.find(key)
            if record.rollout.state == state:
                return record
            await self.second(controller)
        record = await controller.rollouts.find(key)
        raise AssertionError(
            f"not {state} after {at_most} s but {record.rollout.state}: {record.rollout.reason}; "
            f"{[v.sentence for v in record.rollout.verdicts]}"
        )

    async def serving(self, version: str = "1", **settings: Any) -> Controller:
        """A controller that serves a version of m."""
        controller = await self.controller()
        await self.apply(controller, {"m": {"version": version, "rollout": QUICK, **settings}})
        await self.seconds(controller, 4)
        assert default(controller) == version
        return controller

    async def change(self, controller: Controller, version: str, **settings: Any) -> dict[str, Any]:
        """Apply another version."""
        models = {"m": {"version": version, "rollout": QUICK, **settings}}
        return await self.apply(controller, models)

    async def observing(self) -> Controller:
        """A controller that serves version 1 of m and observes version 2."""
        controller = await self.serving()
        await self.change(controller, "2")
        await self.until(controller, "observing")
        return controller

    async def rolled_out(self, controller: Controller, version: str) -> Record:
        """Apply another version and wait until it has succeeded."""
        await self.change(controller, version)
        return await self.until(controller, "succeeded")


def default(controller: Controller) -> str:
    """The version that the published table has for requests that name none, but for the split."""
    return controller.board.table.models["m"].version


def weight(controller: Controller) -> float:
    """The canary's share in the published table."""
    split = controller.board.table.models["m"].split
    return split.weight if split is not None else 0.0


def check(controller: Controller) -> None:
    """What must hold whenever somebody looks."""
    for route in controller.board.table.models.values():
        split = route.split
        if split is None:
            continue
        assert split.canary in route.arms
        assert route.arms[split.canary].role == "canary"
        assert route.arms[split.canary].queue_hold_s == 0.0
        if split.weight > 0:
            assert route.arms[split.canary].endpoints, "weight on a canary without replicas"
        if 0 < split.weight < 1:
            assert route.arms[route.version].endpoints, "weight on a stable without replicas"
    for record in controller.rollouts.records:
        rollout = record.rollout
        failed = [
            v for v in rollout.verdicts if v.verdict is Outcome.FAIL and v.action == "rollback"
        ]
        if failed and rollout.active and not rollout.spec.analysis.dry_run:
            route = controller.board.table.models.get(rollout.model)
            if rollout.stable_lost_at is not None:
                assert route is None or not route.arms[rollout.stable].endpoints, "withheld in vain"
                continue
            assert rollout.weight == 0.0
            if route is not None and route.split is not None:
                assert route.split.weight == 0.0, "a verdict that is not published"


def replayed(store: Store) -> dict[str, dict[str, Any]]:
    """Where each rollout stands by the audit log alone."""
    store.verify_audit()
    standing: dict[str, dict[str, Any]] = {}
    for row in store.audit(after=0, limit=10_000):
        if row.subject != "configuration":
            names = ("to", "step", "epoch", "weight", "serves", "warm_until")
            standing[row.subject] = {name: row.body[name] for name in names}
    return standing


def standing(store: Store) -> dict[str, dict[str, Any]]:
    """Where each rollout stands by its own row."""
    found = {}
    for row in store.rollouts(limit=1000):
        rollout = row.body["rollout"]
        serves = rollout["canary"] if row.state == "succeeded" else rollout["stable"]
        found[row.id] = {
            "to": row.state,
            "step": rollout["step"],
            "epoch": rollout["epoch"],
            "weight": rollout["weight"],
            "serves": serves,
            "warm_until": rollout["warm_until"],
        }
    return found
