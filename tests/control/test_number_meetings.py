"""A changed number of replicas meets sleep, a lack of room, lost answers, rollouts and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.control.status import status
from serving.errors import ClusterError
from tests.control.gpu_site import GIB, FakeGpu
from tests.control.rollout_world import QUICK
from tests.control.test_replicas import HELD, outcome, routed
from tests.control.test_scaler import SCALING, ScaledWorld

SLEEPS: dict[str, Any] = {"min": 0, "max": 2, "idle_to_zero_after": "5s"}


@pytest.fixture
def world(tmp_path: Path) -> ScaledWorld:
    return ScaledWorld(tmp_path)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


@pytest.mark.parametrize("restarted", [False, True])
def test_one_that_sleeps_on_a_gpu_is_given_a_fixed_number(tmp_path: Path, restarted: bool) -> None:
    world = ScaledWorld(tmp_path, gpus=[FakeGpu("GPU-a")])
    world.traffic.requests_s = 0
    model = {"version": "1", "gpu_memory_bytes": 10 * GIB, "ready_timeout_s": 20}

    async def scenario() -> None:
        controller = await world.begin({"m": {**model, "scaling": SLEEPS}})
        await world.seconds(controller, 20)
        assert (world.wanted(controller), world.cluster.phases) == (0, {})
        await world.apply(controller, {"m": {**model, "replicas": 2}})
        if restarted:
            controller = await world.controller()
            await world.measure(controller)
        await world.seconds(controller, 12)
        assert (outcome(controller), len(routed(controller))) == ("converged", 2)

    run(scenario)


@pytest.mark.parametrize("scaling", [{"max": 4}, SLEEPS], ids=["awake", "asleep"])
def test_a_minimum_that_finds_no_room_any_more_is_given_up(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    world = ScaledWorld(tmp_path, gpus=[FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    world.traffic.requests_s = 0
    model = {"version": "1", "gpu_memory_bytes": 20 * GIB, "ready_timeout_s": 20}

    async def scenario() -> None:
        controller = await world.begin({"m": {**model, "scaling": scaling}})
        await world.seconds(controller, 15)
        before = world.wanted(controller)
        await world.apply(controller, {"m": {**model, "scaling": {"min": 2, "max": 4}}})
        # Somebody else takes the memory that it was to have.
        for gpu in world.gpus:
            gpu.others = 0 if gpu.own else 20 * GIB
        await world.seconds(controller, 5)
        assert outcome(controller) == "converging"
        await world.seconds(controller, 25)
        assert outcome(controller) == "failed"
        [error] = status(controller)["errors"]
        assert f"still {before}" in error["error"] or "still 0 to 2" in error["error"]
        assert world.wanted(controller) == before

    run(scenario)


class _Unheard:
    """A cluster that does what it is told while `lost`, and whose answer comes too late."""

    def __init__(self, cluster: Any) -> None:
        self._cluster, self.lost = cluster, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    def scale(self, counts: Mapping[str, int]) -> None:
        self._cluster.scale(counts)
        if self.lost:
            raise ClusterError("the cluster did not answer within 10 s")


def test_a_number_that_serve_may_have_heard_is_taken_back(world: ScaledWorld) -> None:
    async def scenario() -> None:
        found: list[_Unheard] = []

        def wrap(target: Any, name: str) -> Any:
            if name == "cluster":
                found.append(_Unheard(target))
                return found[0]
            return target

        controller = await world.controller(wrap)
        [cluster] = found
        await world.apply(controller, {"m": {"version": "1", "rollout": QUICK}})
        await world.seconds(controller, 4)
        cluster.lost = True
        await world.change(controller, "1", replicas=3)
        with pytest.raises(ClusterError):
            await world.second(controller)
        cluster.lost = False
        await world.change(controller, "1", replicas=1)
        await world.seconds(controller, 8)
        assert (outcome(controller), len(routed(controller))) == ("converged", 1)
        [app] = world.cluster.apps.values()
        assert app.count == 1, "nobody routes to these, and nobody stops them"

    run(scenario)


async def _killed_anywhere(world: ScaledWorld, steps: list[dict[str, Any]]) -> Controller:
    controller = await world.serving(replicas=2)
    for settings in steps:
        await world.change(controller, **settings)
        await controller.step(look=True)
        controller = await world.controller()
        await world.second(controller)
    await world.seconds(controller, 30)
    return controller


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ([{"version": "1", "replicas": 5}, {"version": "1", "replicas": 1}], 1),
        ([{"version": "1", "scaling": SCALING}, {"version": "1", "replicas": 4}], 4),
        ([{"version": "1", "replicas": 1}, {"version": "1", "scaling": {"min": 3, "max": 4}}], 3),
        ([{"version": "2", "rollout": HELD, "replicas": 3}, {"version": "1", "replicas": 3}], 3),
    ],
)
def test_controllers_that_end_between_changes_of_the_number_come_to_the_last(
    world: ScaledWorld, steps: list[dict[str, Any]], count: int
) -> None:
    async def scenario() -> None:
        controller = await _killed_anywhere(world, steps)
        assert (outcome(controller), len(routed(controller))) == ("converged", count)
        assert [a.count for a in world.cluster.apps.values() if a.name in world.cluster.phases] == [
            count
        ]

    run(scenario)
