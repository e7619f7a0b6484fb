"""Restarts of the new version: each is counted and nothing else is, whatever else happens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.control.records import Replicas
from serving.core.rollout_types import Rollout
from serving.errors import StoreError
from tests.control.rollout_world import QUICK, RolloutWorld

# Two restarts are a crash loop: so many are none.
PATIENT = {
    **QUICK,
    "steps": [{"weight": 20, "hold": 60}],
    "analysis": {"min_units": 8, "triggers": {"crash_loop": {"failures": 9}}},
}


@pytest.fixture
def world(tmp_path: Path) -> RolloutWorld:
    return RolloutWorld(tmp_path)


async def observing(world: RolloutWorld, replicas: int = 1) -> Controller:
    controller = await world.serving(replicas=replicas, rollout=PATIENT)
    await world.change(controller, "2", replicas=replicas, rollout=PATIENT)
    await world.until(controller, "observing")
    return controller


async def rollout(controller: Controller) -> Rollout:
    return (await controller.rollouts.find("m")).rollout


def test_settings_there_and_back_are_no_restarts(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await observing(world, replicas=2)
        for settings in ({"batching": {"max_size": 3}}, {}):
            await world.change(controller, "2", replicas=2, rollout=PATIENT, **settings)
            await world.seconds(controller, 14)
        now = await rollout(controller)
        assert (now.state, now.restarts) == ("observing", ())
        names = [name for name in world.cluster.started if "-v2-" in name]
        assert len(names) == 3
        assert names[0] == names[2], "the same application, started twice"

    asyncio.run(scenario())


def test_a_restart_that_a_failed_tick_saw_is_not_lost(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await observing(world)
        commit = world.store.commit

        def locked(**_: Any) -> None:
            raise StoreError("it is locked by another process")

        for generation in (1, 2):
            world.cluster.generation["2"] = generation
            world.store.commit = locked  # type: ignore[method-assign]
            with pytest.raises(StoreError):
                await world.second(controller)
            world.store.commit = commit  # type: ignore[method-assign]
            await world.seconds(controller, 5)
        assert len((await rollout(controller)).restarts) == 2

    asyncio.run(scenario())


def test_restarts_while_the_controller_is_away_are_counted(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await observing(world)
        for generation in (1, 2, 3):
            world.cluster.generation["2"] = generation
            controller = await world.controller()
            await world.seconds(controller, 8)
        assert len((await rollout(controller)).restarts) == 3

    asyncio.run(scenario())


def test_a_replica_that_was_not_heard_for_a_while_is_no_restart(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await observing(world)
        world.cluster.silent.add("2")
        await world.seconds(controller, 12)
        world.cluster.silent.clear()
        await world.seconds(controller, 3)
        now = await rollout(controller)
        assert (now.state, now.restarts) == ("observing", ())

    asyncio.run(scenario())


def test_who_was_seen_is_remembered_within_bounds() -> None:
    known = Replicas()
    for n in range(2000):
        current = {(f"app#{n}", 1): "app", ("app#stays", 1): "app"}
        restarts, known = known.looked("app", current, wanted=1)
        assert restarts == (1 if n else 0)
    assert len(known.seen) < 300
    assert known.looked("app", {("app#1990", 1): "app"}, wanted=1)[0] == 0
    assert known.looked("other", {("other#1", 1): "other"}, wanted=1)[1] == Replicas(
        "other", (("other#1", 1),), ("other",), 1
    )


def test_one_more_and_one_that_moved_are_no_restarts() -> None:
    _, known = Replicas().looked("app", {("a", 1): "app.0"}, wanted=1)
    moved, known = known.looked("app", {("a", 1): "app.0", ("b", 2): "app.1"}, wanted=1)
    assert moved == 0
    died, known = known.looked("app", {("a", 1): "app.0", ("c", 3): "app.1"}, wanted=1)
    assert died == 1
    _, grown = Replicas().looked("app", {("a", 1): "app"}, wanted=2)
    more, grown = grown.looked("app", {("a", 1): "app", ("b", 2): "app"}, wanted=2)
    assert more == 0
    assert grown.looked("app", {("a", 1): "app", ("c", 3): "app"}, wanted=2)[0] == 1
