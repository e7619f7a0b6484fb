"""Budgets of tenants: from a gateway's report to what gateways are told, over restarts and days."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.control.admin import create_app
from serving.control.controller import Controller
from serving.control.metrics import exposition
from serving.errors import StoreError
from tests.control.world import World, model_row

SECOND = 10**9
DAY_S = 86_400
MODEL = {"m": {"version": "1", "usd_per_hour": 3600.0}}
"""A dollar a second."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, tenants={"header": "x-tenant", "budgets": {"a": 5.0, "b": None}})


def answered(seconds: dict[str, float]) -> float:
    return sum(seconds.values())


class Run:
    """A replica that a gateway reports of; `direct` are seconds by tenant, since their start."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.direct: dict[str, float] = {}
        self.failed: dict[str, float] = {}

    def announce(self, controller: Controller) -> None:
        seconds = answered(self.direct) + answered(self.failed)
        usage = dict.fromkeys(("padding_ns", "failed_ns", "warmup_ns"), 0)
        up_ns = int((100 + self.world.monotonic) * SECOND)
        for info in self.world.cluster.announcements():
            controller.announce(
                {
                    **info,
                    "cores": 1,
                    "usage": {**usage, "up_ns": up_ns, "answered_ns": int(seconds * SECOND)},
                }
            )

    def report(self, controller: Controller) -> dict[str, Any]:
        rows = [[t, "direct", int(s * SECOND), 1] for t, s in self.direct.items()]
        rows += [[t, "failed", int(s * SECOND), 1] for t, s in self.failed.items()]
        entry = {"replica": next(iter(self.world.cluster.apps)) + "#0", "began": 1, "rows": rows}
        models = [model_row("1", int(answered(self.direct)))]
        revision = controller.board.revision
        return controller.report(self.world.report(revision, models=models, usage=[entry]))

    async def second(self, controller: Controller) -> dict[str, Any]:
        """A second passes; what the gateway is told at its end."""
        self.world.monotonic += 1.0
        self.announce(controller)
        self.report(controller)
        await controller.step(look=False)
        return self.report(controller)

    async def start(self) -> Controller:
        controller = await self.world.controller()
        await self.world.apply(controller, MODEL)
        await self.world.settle(controller)
        return controller


def test_whoever_has_spent_his_budget_is_told_of_within_a_second(world: World) -> None:
    async def scenario() -> None:
        run = Run(world)
        controller = await run.start()
        run.direct = {"a": 4.5, "b": 60.0, "c": 3.0}
        assert (await run.second(controller))["spent"] == {}
        # What failed is nobody's to pay.
        run.failed = {"a": 9.0}
        assert (await run.second(controller))["spent"] == {}
        run.direct["a"] = 5.0
        told = {"a": {"budget": 5.0, "spent": 5.0, "until": DAY_S}}
        assert (await run.second(controller))["spent"] == told

    asyncio.run(scenario())


def test_a_restart_forgets_nothing_that_was_spent(world: World) -> None:
    async def scenario() -> None:
        run = Run(world)
        controller = await run.start()
        run.direct = {"a": 5.5}
        assert "a" in (await run.second(controller))["spent"]
        await controller.cost(["tenant"], None)
        # At its first breath, before anybody has reported to it.
        again = await world.controller()
        told = again.report(world.report(again.board.revision))
        assert told["spent"]["a"]["spent"] == 5.5
        # And nothing is counted twice.
        run.announce(again)
        assert (await run.second(again))["spent"]["a"]["spent"] == 5.5
        # Another `serving up` on the same store is the same tenant's day.
        world.deployment = "second"
        fresh = await world.controller()
        assert "a" in fresh.report(world.report(0))["spent"]

    asyncio.run(scenario())


def test_a_budget_renews_at_midnight(world: World) -> None:
    async def scenario() -> None:
        run = Run(world)
        controller = await run.start()
        world.monotonic = DAY_S - 1000.0 - 30.0
        run.direct = {"a": 6.0}
        told = (await run.second(controller))["spent"]
        assert told["a"]["until"] == DAY_S
        world.monotonic = DAY_S - 1000.0
        assert (await run.second(controller))["spent"] == {}
        run.direct = {"a": 6.0 + 4.0}
        assert (await run.second(controller))["spent"] == {}
        [row] = controller.budget_rows()
        assert row["spent_usd"] == pytest.approx(4.0)
        run.direct = {"a": 6.0 + 5.5}
        told = (await run.second(controller))["spent"]
        assert told["a"]["until"] == 2 * DAY_S
        # A controller that starts today does not count yesterday.
        await controller.cost(["tenant"], None)
        [row] = (await world.controller()).budget_rows()
        assert row["spent_usd"] == pytest.approx(5.5)

    asyncio.run(scenario())


def test_a_store_that_is_away_is_no_reason_to_spend_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("the disk is full")

    async def scenario() -> None:
        run = Run(world)
        controller = await run.start()
        monkeypatch.setattr(world.store, "save_counters", fail)
        run.direct = {"a": 6.0}
        await run.second(controller)
        assert controller.problems.last == "the disk is full"
        assert "a" in run.report(controller)["spent"]

    asyncio.run(scenario())


def test_who_is_not_named_has_the_budget_of_all_others(tmp_path: Path) -> None:
    budgets = {"*": 2.0, "rich": None}
    world = World(tmp_path, tenants={"header": "x-tenant", "budgets": budgets})

    async def scenario() -> None:
        run = Run(world)
        controller = await run.start()
        run.direct = {"x": 2.5, "y": 1.0, "rich": 9.0}
        assert (await run.second(controller))["spent"].keys() == {"x"}
        left = {row["tenant"]: row["left_usd"] for row in controller.budget_rows()}
        assert left == {"default": 2.0, "x": 0.0, "y": pytest.approx(1.0)}

    asyncio.run(scenario())


def test_without_budgets_gateways_are_told_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def scenario() -> None:
        run = Run(world)
        controller = await run.start()
        run.direct = {"default": 1.0}
        assert await run.second(controller) == {}

    asyncio.run(scenario())


def test_views_and_metrics(world: World) -> None:
    async def scenario() -> None:
        run = Run(world)
        controller = await run.start()
        run.direct = {"a": 1.25}
        await run.second(controller)
        transport = httpx.ASGITransport(app=create_app(controller, host="", ray_version="2.60"))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            found = (await client.get("/v1/cost?by=tenant")).json()
        assert found["budgets"] == [
            {
                "tenant": "a",
                "usd_per_day": 5.0,
                "spent_usd": 1.25,
                "left_usd": 3.75,
                "renews_at": DAY_S,
            }
        ]
        text = exposition(controller, "2.60").decode()
        assert 'serving_tenant_budget_usd{tenant="a"} 5.0' in text
        assert 'serving_tenant_spent_usd{tenant="a"} 1.25' in text
        assert 'serving_tenant_budget_usd{tenant="b"}' not in text

    asyncio.run(scenario())
