"""What the review of the control plane found, and what must not come back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serving.config import StoreConfig
from serving.control.layout import check_fixed_settings
from serving.errors import ConfigError, ConflictError
from tests.control.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_nothing_is_retired_before_a_gateway_says_that_it_is_done(world: World) -> None:
    """A controller that has just restarted has heard no gateway: silence is no consent."""

    async def scenario() -> tuple[list[str], list[str]]:
        first = await world.controller()
        await world.apply(first, {"m": {"version": "1"}})
        await world.settle(first)
        await world.apply(first, {"m": {"version": "2"}})
        for _ in range(4):  # version 2 becomes ready and is routed; the gateway says nothing
            world.monotonic += 1.0
            world.announce(first)
            await first.step(look=True)
        again = await world.controller()
        for _ in range(3):
            world.announce(again)
            await again.step(look=True)
        early = list(world.cluster.deleted)
        await world.settle(again)
        return early, list(world.cluster.deleted)

    early, late = asyncio.run(scenario())
    assert early == []
    assert len(late) == 1
    assert late[0].startswith("model-m-v1-")


def test_a_refused_change_of_the_store_does_not_tell_its_password(world: World) -> None:
    running = world.config().model_copy(
        update={"store": StoreConfig(url="postgresql://u:hunter2@db/x")}
    )
    with pytest.raises(ConflictError, match="store is another") as refusal:
        check_fixed_settings(world.config(), running)
    assert "hunter2" not in str(refusal.value)


def test_applying_again_after_a_failure_starts_afresh(world: World) -> None:
    async def scenario() -> tuple[int, str]:
        controller = await world.controller()
        world.cluster.broken.add("1")
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller, steps=4)
        tried = len(world.cluster.started)
        world.cluster.broken.clear()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller, steps=4)
        routed = controller.state.routed.models
        return len(world.cluster.started) - tried, routed["m"].version if routed else ""

    started_again, routed = asyncio.run(scenario())
    assert started_again == 1
    assert routed == "1"


@pytest.mark.parametrize("name", ["GPU", "CPU", "memory", ""])
def test_resources_that_are_not_for_the_user_are_refused(world: World, name: str) -> None:
    with pytest.raises(ConfigError, match="resources"):
        world.config({"m": {"version": "1", "resources": {name: 1}}})
