"""Time in which no controller looked: it is no part of any hold, and nothing is decided on it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from tests.control.rollout_world import QUICK, RolloutWorld
from tests.control.world import gateway_report

HOUR_S = 3600.0
BAKE = {**QUICK, "bake": {"duration": 30}}


@pytest.fixture
def world(tmp_path: Path) -> RolloutWorld:
    return RolloutWorld(tmp_path)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def away(world: RolloutWorld, controller: Controller, how: str) -> Controller:
    """An hour later: of a controller that took over, or of one that stood still as long."""
    world.monotonic += HOUR_S
    again = await world.controller() if how == "restarted" else controller
    world.announce(again)
    return again


async def state(controller: Controller) -> str:
    return str((await controller.rollouts.find("m")).rollout.state)


@pytest.mark.parametrize("how", ["restarted", "stood still"])
def test_an_hour_in_which_nobody_looked_is_no_bake(world: RolloutWorld, how: str) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        await world.change(controller, "2", rollout=BAKE)
        await world.until(controller, "baking")
        await world.seconds(controller, 10)
        controller = await away(world, controller, how)
        for _ in range(14):
            await world.second(controller)
            assert await state(controller) == "baking"
        await world.until(controller, "succeeded", at_most=10)

    run(scenario())


@pytest.mark.parametrize("how", ["restarted", "stood still"])
def test_a_version_is_not_given_up_for_an_hour_in_which_nobody_looked(
    world: RolloutWorld, how: str
) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        world.cluster.silent.add("2")
        await world.change(controller, "2")
        await world.until(controller, "preparing")
        await world.seconds(controller, 5)
        controller = await away(world, controller, how)
        await world.seconds(controller, 5)
        assert await state(controller) == "preparing"
        world.cluster.silent.clear()
        await world.until(controller, "observing")

    run(scenario())


def test_nothing_goes_on_before_gateways_have_said_what_they_counted(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        await world.change(controller, "2", rollout=BAKE)
        await world.until(controller, "baking")
        await world.seconds(controller, 29)
        # Its time is over with the next look; what gateways count now nobody hears.
        world.monotonic += 2.0
        again = await world.controller()
        world.announce(again)
        await again.step(look=True)
        assert await state(again) == "baking"
        for gateway in world.traffic.fleet:
            again.report(gateway.report())
        await again.step(look=True)
        world.monotonic += 1.0
        await again.step(look=True)
        assert await state(again) == "succeeded"

    run(scenario())


def test_what_a_rollout_knows_of_looks_is_saved_once_a_minute(world: RolloutWorld) -> None:
    """Of a rollout to which nothing happens too: else a restart takes all its time for nobody's."""

    async def scenario() -> None:
        world.traffic.requests_s = 0
        controller = await world.serving()
        world.cluster.silent.add("2")
        await world.change(controller, "2", rollout={**QUICK, "ready_timeout": 150})
        await world.until(controller, "preparing")
        await world.seconds(controller, 100)
        world.monotonic += 5.0
        again = await world.controller()
        world.announce(again)
        again.report(gateway_report("g", again.board.revision))
        await world.until(again, "rolled_back", at_most=130)
        assert "after 2 min" in (await again.rollouts.find("m")).rollout.reason

    run(scenario())
