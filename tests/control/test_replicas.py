"""A changed number of replicas: in the application that runs, at once or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.control.status import status
from serving.errors import ConflictError
from tests.control.gpu_site import GIB, FakeGpu
from tests.control.rollout_world import QUICK, weight
from tests.control.test_scaler import ScaledWorld, shown

HELD = {**QUICK, "steps": [{"weight": 20, "hold": 60}], "bake": {"duration": 4}}


@pytest.fixture
def world(tmp_path: Path) -> ScaledWorld:
    return ScaledWorld(tmp_path)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def outcome(controller: Controller) -> str:
    return str(status(controller)["apply"]["state"])


def lines(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(c["change"], c["version"], c["reason"]) for c in plan["changes"]]


def routed(controller: Controller, version: str = "1") -> list[str]:
    arm = controller.board.table.models["m"].arms[version]
    return [e.replica for e in arm.endpoints]


def test_only_the_difference_starts_and_stops(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        [first] = routed(controller)
        models = {"m": {"version": "1", "rollout": QUICK, "replicas": 3}}
        plan = await world.apply(controller, models, dry_run=True)
        assert lines(plan) == [("scale", "1", "1 -> 3 replicas")]
        await world.second(controller)
        assert world.cluster.scaled == []

        await world.apply(controller, models)
        await controller.step(look=True)
        assert world.cluster.scaled == [(world.cluster.started[0], 3)]
        assert (outcome(controller), shown(controller)["wanted"]) == ("converging", 3)
        assert controller.board.table.models["m"].arms["1"].replicas == 1
        again = await world.apply(controller, models, dry_run=True)
        assert lines(again) == [("unchanged", "1", "")]
        await world.seconds(controller, 2)
        assert outcome(controller) == "converged"
        assert len(routed(controller)) == 3
        assert first in routed(controller)
        assert controller.board.table.models["m"].arms["1"].replicas == 3

        plan = await world.change(controller, "1", replicas=2)
        assert lines(plan) == [("scale", "1", "3 -> 2 replicas")]
        await controller.step(look=True)
        assert outcome(controller) == "converging", "the one that goes still has requests"
        await world.seconds(controller, 8)
        assert outcome(controller) == "converged"
        assert len(routed(controller)) == 2
        assert first in routed(controller)
        assert len(world.cluster.started) == 1
        assert world.cluster.deleted == []
        assert [n for _, n in world.cluster.scaled] == [3, 2]

    run(scenario)


def test_where_not_all_start_the_old_number_goes_on(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(ready_timeout_s=20, replicas=2)
        world.cluster.capacity = 3
        await world.change(controller, "1", ready_timeout_s=20, replicas=4, timeout_ms=7000)
        await world.seconds(controller, 10)
        arm = controller.board.table.models["m"].arms["1"]
        assert (arm.timeout_s, arm.replicas) == (7.0, 2), "what gateways do waits for nobody"
        assert outcome(controller) == "converging"
        controller = await world.controller()
        await world.seconds(controller, 15)
        assert outcome(controller) == "failed"
        [error] = status(controller)["errors"]
        assert error["error"] == (
            "still 2 instead of 4 replicas: 3 of 4 replicas ready within ready_timeout_s=20"
        )
        await world.seconds(controller, 5)
        found = shown(controller)
        assert (found["state"], found["wanted"], len(routed(controller))) == ("ready", 2, 2)
        assert world.cluster.scaled[-1][1] == 2

        world.cluster.capacity = 100
        plan = await world.change(controller, "1", ready_timeout_s=20, replicas=4, timeout_ms=7000)
        assert lines(plan) == [("scale", "1", "2 -> 4 replicas")]
        await world.seconds(controller, 3)
        assert (outcome(controller), len(routed(controller))) == ("converged", 4)
        assert len(world.cluster.started) == 1

    run(scenario)


def test_a_replica_that_cannot_load_is_the_reason(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        world.cluster.capacity = 1
        await world.change(controller, "1", replicas=2)
        [running] = world.cluster.announcements()
        name = f"{running['app']}#1"
        failed = {**running, "replica": name, "state": "failed", "error": "no memory left"}
        controller.announce({**failed, "unix": None})
        await world.seconds(controller, 1)
        [error] = status(controller)["errors"]
        assert error["error"] == "still 1 instead of 2 replicas: no memory left"
        assert (shown(controller)["wanted"], len(routed(controller))) == (1, 1)

    run(scenario)


def test_a_number_changed_during_a_rollout_goes_for_both_versions(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(rollout=HELD)
        await world.change(controller, "2", rollout=HELD)
        record = await world.until(controller, "observing")
        plan = await world.change(controller, "2", rollout=HELD, replicas=2)
        assert [(change, version) for change, version, _ in lines(plan)] == [
            ("scale", "1"),
            ("scale", "2"),
        ]
        await world.seconds(controller, 5)
        assert len(routed(controller, "1")) == len(routed(controller, "2")) == 2
        after = await controller.rollouts.find("m")
        assert after.rollout.id == record.rollout.id
        assert (after.rollout.state, after.rollout.restarts) == ("observing", ())
        assert weight(controller) == 0.2
        assert len(world.cluster.started) == 2

    run(scenario)


def test_more_replicas_of_a_canary_that_do_not_start_do_not_take_it_back(
    world: ScaledWorld,
) -> None:
    async def scenario() -> None:
        controller = await world.serving(rollout=HELD, ready_timeout_s=20)
        await world.change(controller, "2", rollout=HELD, ready_timeout_s=20)
        await world.until(controller, "observing")
        world.cluster.capacity = 1
        await world.change(controller, "2", rollout=HELD, ready_timeout_s=20, replicas=2)
        await world.seconds(controller, 25)
        assert outcome(controller) == "failed"
        assert (await controller.rollouts.find("m")).rollout.state == "observing"
        assert len(routed(controller, "1")) == len(routed(controller, "2")) == 1

    run(scenario)


def test_a_number_that_came_with_a_version_is_that_versions(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(rollout=HELD, replicas=3)
        await world.change(controller, "2", rollout=HELD, replicas=2)
        await world.until(controller, "observing")
        # To say the same once more changes nothing.
        await world.change(controller, "2", rollout=HELD, replicas=2)
        await world.seconds(controller, 3)
        assert (len(routed(controller, "1")), len(routed(controller, "2"))) == (3, 2)
        await controller.command_rollout(
            "m", "rollback", actor="t", reason="too slow", expected_state=None
        )
        await world.until(controller, "rolled_back")
        await world.change(controller, "2", rollout=HELD, replicas=2)
        await world.seconds(controller, 6)
        assert len(routed(controller)) == 3, "two may be what was too few"
        plan = await world.change(controller, "2", rollout=HELD, replicas=4)
        assert [(change, version) for change, version, _ in lines(plan)] == [
            ("scale", "1"),
            ("held", "2"),
        ]
        await world.seconds(controller, 3)
        assert len(routed(controller)) == 4

    run(scenario)


def test_a_version_at_once_starts_with_the_new_number(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(rollout="immediate")
        await world.change(controller, "2", rollout="immediate", replicas=3)
        await controller.step(look=True)
        assert world.wanted(controller) == 1, "the old one stays as it is"
        await world.seconds(controller, 5)
        assert len(routed(controller, "2")) == 3
        assert world.cluster.scaled == []

    run(scenario)


def test_from_a_fixed_number_to_scaling_and_back(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(replicas=2)
        scaling = {"max": 4, "scale_down_after": "5s"}
        plan = await world.change(controller, "1", scaling=scaling)
        assert lines(plan)[0][2].startswith("2 -> 1 to 4 replicas")
        world.busy["1"] = 2.5
        await world.seconds(controller, 20)
        assert len(routed(controller)) == 4
        world.cluster.capacity = 5
        plan = await world.change(controller, "1", replicas=6, ready_timeout_s=20)
        await world.seconds(controller, 5)
        assert world.wanted(controller) == 6
        await world.seconds(controller, 20)
        assert outcome(controller) == "failed"
        assert world.wanted(controller) == 4, "what it had come to goes on"
        await world.change(controller, "1", replicas=3)
        await world.seconds(controller, 8)
        assert (outcome(controller), len(routed(controller))) == ("converged", 3)
        assert len(world.cluster.started) == 1

    run(scenario)


def test_an_apply_waits_until_the_new_minimum_is_ready(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(scaling={"max": 4})
        world.cluster.capacity = 2
        await world.change(controller, "1", scaling={"min": 3, "max": 4})
        await world.seconds(controller, 5)
        assert (outcome(controller), world.wanted(controller)) == ("converging", 3)
        world.cluster.capacity = 100
        await world.seconds(controller, 3)
        assert (outcome(controller), len(routed(controller))) == ("converged", 3)

    run(scenario)


def test_on_gpus_seats_are_added_where_there_is_room(tmp_path: Path) -> None:
    world = ScaledWorld(tmp_path, gpus=[FakeGpu("GPU-a")])

    def sized(replicas: int) -> dict[str, Any]:
        return {"m": {"version": "1", "gpu_memory_bytes": 10 * GIB, "replicas": replicas}}

    async def scenario() -> None:
        controller = await world.begin(sized(1))
        [app] = world.cluster.started
        with pytest.raises(ConflictError, match=r"model 'm' version 1 needs 2 × 10\.0 GiB"):
            await world.apply(controller, sized(3))
        assert world.wanted(controller) == 1
        plan = await world.apply(controller, sized(3), dry_run=True)
        [row] = plan["placement"]["models"]
        assert (row["replicas"], row["new"]) == (3, True)
        assert row["refused"]

        await world.apply(controller, sized(2))
        await world.seconds(controller, 5)
        assert (outcome(controller), len(routed(controller))) == ("converged", 2)
        assert list(world.cluster.seats[app]) == [f"{app}.0", f"{app}.1"]
        await world.apply(controller, sized(1))
        await world.seconds(controller, 6)
        assert (outcome(controller), len(routed(controller))) == ("converged", 1)
        assert world.cluster.deleted == [f"{app}.1"]
        assert world.cluster.scaled == []

    run(scenario)
