"""What the review of the control plane found, and what must not come back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from serving.config import StoreConfig
from serving.control.controller import Controller
from serving.control.layout import check_fixed_settings
from serving.errors import ConfigError, ConflictError, RegistryError
from tests.control.world import FakeCluster, World


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


def test_what_an_earlier_deployment_applied_makes_no_gateway_ready(world: World) -> None:
    """A second `serving up` on a home: until its own apply there is no table to be ready by."""

    async def scenario() -> list[bool]:
        first = await world.controller()
        await world.apply(first, {"m": {"version": "1"}})
        await world.settle(first)
        world.deployment, world.cluster = "second", FakeCluster()
        second = await world.controller()
        await world.settle(second, steps=3)
        before_apply = second.board.table.complete
        await world.apply(second, {"m": {"version": "1"}})
        await second.step(look=True)
        loading = second.board.table.complete
        await world.settle(second)
        return [before_apply, loading, second.board.table.complete]

    assert asyncio.run(scenario()) == [False, False, True]


@pytest.mark.parametrize("applied", [{"m": {"version": "1"}}, {}], ids=["a model", "no model"])
def test_a_controller_killed_before_its_first_table_leaves_none_of_the_former_deployment(
    world: World, applied: dict[str, Any]
) -> None:
    async def scenario() -> list[tuple[list[str], bool]]:
        seen = []

        def look(controller: Controller) -> None:
            table = controller.board.table
            assert table.revision > former, "a gateway takes over no older table"
            seen.append((sorted(table.models), table.complete))

        first = await world.controller()
        await world.apply(first, applied)
        await world.settle(first)
        assert first.board.table.complete
        former = first.board.revision
        world.deployment, world.cluster = "second", FakeCluster()
        second = await world.controller()
        await world.apply(second, {"m": {"version": "2"}})
        # It is killed while the model loads.
        third = await world.controller()
        look(third)
        # By now it no longer waits for the replicas of a stored table.
        world.monotonic += 10.0
        await third.step(look=True)
        look(third)
        await world.settle(third)
        look(third)
        return seen

    assert asyncio.run(scenario()) == [([], False), ([], False), (["m"], True)]


def test_a_table_is_complete_once_every_version_is_routed_and_stays_so(world: World) -> None:
    async def scenario() -> list[tuple[list[str], bool]]:
        seen = []

        def look() -> None:
            table = controller.board.table
            seen.append((sorted(table.models), table.complete))

        controller = await world.controller()
        world.cluster.broken.add("2")
        await world.apply(controller, {"a": {"version": "1"}, "b": {"version": "2"}})
        await world.settle(controller)
        look()
        world.cluster.broken.clear()
        await world.apply(controller, {"a": {"version": "1"}, "b": {"version": "2"}})
        await world.settle(controller)
        look()
        world.cluster.broken.add("3")
        await world.apply(controller, {"a": {"version": "1"}, "c": {"version": "3"}})
        await world.settle(controller)
        look()
        controller = await world.controller()
        await world.settle(controller)
        look()
        return seen

    assert asyncio.run(scenario()) == [
        (["a"], False),
        (["a", "b"], True),
        (["a"], True),
        (["a"], True),
    ]


def test_a_configuration_without_models_is_complete(world: World) -> None:
    async def scenario() -> tuple[int, bool]:
        controller = await world.controller()
        await world.apply(controller, {})
        await world.settle(controller, steps=2)
        return controller.board.revision, controller.board.table.complete

    revision, complete = asyncio.run(scenario())
    assert revision > 0
    assert complete


def test_an_application_that_can_never_start_is_given_up_and_stops_no_other(world: World) -> None:
    async def scenario() -> tuple[list[str], dict[str, str], str]:
        controller = await world.controller()
        world.cluster.refused.add("2")
        await world.apply(controller, {"good": {"version": "1"}, "bad": {"version": "2"}})
        await world.settle(controller)
        state = controller.state
        given_up = {name.split("-")[1]: why for name, why in state.given_up.items()}
        return sorted(state.routed.models), given_up, controller.reconciler.outcome

    assert asyncio.run(scenario()) == (["good"], {"bad": "never"}, "failed")


@pytest.mark.parametrize("way", ["behind an alias", "removed and added again"])
def test_a_version_that_was_replaced_is_refused_always(world: World, way: str) -> None:
    async def scenario() -> None:
        first = await world.controller()
        await world.apply(first, {"m": {"version": "@champion"}})
        again = {"m": {"version": "@champion"}}
        if way == "removed and added again":
            await world.apply(first, {})
            again = {"m": {"version": "1"}}
        world.deployment = "second"
        second = await world.controller()
        world.resolver.digests["1"] = "sha256:" + "f" * 64
        with pytest.raises(RegistryError, match="it was replaced"):
            await world.apply(second, again)

    asyncio.run(scenario())
