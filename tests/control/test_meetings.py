"""Where moves, scaling, rollouts and failures meet."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.control.state import AppStatus
from serving.core.plan import Phase
from serving.errors import ClusterError, StoreError
from tests.control.gpu_site import GIB, FakeGpu, GpuWorld, model
from tests.control.rollout_world import QUICK
from tests.control.test_mover import cordon
from tests.control.test_scaler import SCALING, ScaledWorld, asleep, run, shown

HELD = {**QUICK, "steps": [{"weight": 20, "hold": 60}], "bake": {"duration": 4}}


def six_gpus() -> list[FakeGpu]:
    return [FakeGpu(f"GPU-{name}") for name in "abcdef"]


async def observing(world: GpuWorld) -> Controller:
    """Both versions have two replicas, each on a GPU of its own."""
    controller = await world.begin({"m": model("1", 20, replicas=2)})
    await world.apply(controller, {"m": model("2", 20, replicas=2, rollout=HELD)})
    await world.until(controller, "observing")
    await world.seconds(controller, 2)
    return controller


async def evict_the_canary(world: GpuWorld, controller: Controller) -> None:
    """Its replicas' GPUs are cordoned, and seats elsewhere are there."""
    for lease in [x for x in controller.placer.book.leases if "-v2-" in x.app]:
        await cordon(controller, lease.terms.uuid)
    [app] = [name for name in world.cluster.seats if "-v2-" in name]
    for _ in range(10):
        await controller.step(look=True)
        if len(world.cluster.seats[app]) == 4:
            return
    raise AssertionError("no seats elsewhere")


async def restarts(controller: Controller) -> tuple[str, tuple[float, ...]]:
    rollout = (await controller.rollouts.find("m")).rollout
    return rollout.state.value, rollout.restarts


class Disk:
    """The store refuses commits while it is full."""

    def __init__(self, world: GpuWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        commit = world.store.commit

        def refuse(**what: Any) -> Any:
            if self.full:
                raise StoreError("the disk is full")
            return commit(**what)

        monkeypatch.setattr(world.store, "commit", refuse)

    async def fills(self, world: GpuWorld, controller: Controller) -> None:
        """For a second."""
        self.full = True
        with pytest.raises(StoreError):
            await world.second(controller)
        self.full = False


def test_a_canary_moves_while_the_controller_is_replaced(tmp_path: Path) -> None:
    world = GpuWorld(tmp_path, gpus=six_gpus())

    async def scenario() -> None:
        controller = await observing(world)
        await evict_the_canary(world, controller)
        successor = await world.controller()
        await world.seconds(successor, 15)
        assert await restarts(successor) == ("observing", ())

    run(scenario())


def test_a_canary_moves_and_a_commit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = GpuWorld(tmp_path, gpus=six_gpus())

    async def scenario() -> None:
        controller = await observing(world)
        disk = Disk(world, monkeypatch)
        await evict_the_canary(world, controller)
        await disk.fills(world, controller)
        await world.seconds(controller, 10)
        assert await restarts(controller) == ("observing", ())

    run(scenario())


def test_a_canary_grows_while_the_controller_is_replaced(tmp_path: Path) -> None:
    world = ScaledWorld(tmp_path)

    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING)
        await world.change(controller, "2", scaling=SCALING, rollout=HELD)
        await world.until(controller, "observing")
        world.busy["2"] = 2.5
        for _ in range(40):
            await world.second(controller)
            if world.wanted(controller, "2") > shown(controller, "2")["ready"]:
                break
        successor = await world.controller()
        await world.seconds(successor, 12)
        assert await restarts(successor) == ("observing", ())

    run(scenario())


def test_what_ran_out_of_memory_in_a_tick_that_was_not_saved_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = GpuWorld(tmp_path, gpus=six_gpus())

    async def scenario() -> None:
        world.says["2"] = {"oom_batches": 0}
        controller = await observing(world)
        disk = Disk(world, monkeypatch)
        world.says["2"] = {"oom_batches": 50}
        await disk.fills(world, controller)
        await world.until(controller, "rolled_back")
        reason = (await controller.rollouts.find("m")).rollout.reason
        assert reason.startswith("oom: runs of the canary did not fit into memory 100 times")

    run(scenario())


def test_a_seat_that_serve_gives_up_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it scales up, and when it wakes."""
    world = ScaledWorld(tmp_path, gpus=[FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    scaling = {"min": 0, "max": 4, "scale_down_after": "5s", "idle_to_zero_after": "5s"}
    dead: set[str] = set()
    observe = world.cluster.observe

    def given_up() -> dict[str, AppStatus]:
        found = observe()
        for status in found.values():
            phases = {s: Phase.FAILED if s in dead else p for s, p in status.seats.items()}
            object.__setattr__(status, "seats", phases)
        return found

    monkeypatch.setattr(world.cluster, "observe", given_up)

    async def scenario() -> None:
        settings = {"gpu_memory_bytes": 10 * GIB, "scaling": scaling}
        controller = await world.begin({"m": {"version": "1", **settings}})
        [app] = world.cluster.started
        dead.add(f"{app}.1")
        world.cluster.slow = {f"{app}.1"}
        world.busy["1"] = 1.3
        await world.seconds(controller, 25)
        assert shown(controller)["ready"] == 2
        assert list(world.cluster.seats[app]) == [f"{app}.0", f"{app}.2"]

        world.busy["1"], world.traffic.requests_s = 0.0, 0
        await world.seconds(controller, 40)
        assert shown(controller)["state"] == "asleep"
        dead.add(f"{app}.0")
        world.cluster.slow = {f"{app}.0"}
        controller.report(asleep(2, controller.board.revision))
        await controller.step(look=False)
        for _ in range(8):
            controller.report(asleep(2, controller.board.revision))
            await world.second(controller)
        assert shown(controller)["ready"] >= 1
        assert f"{app}.0" not in world.cluster.seats[app]

    run(scenario())


def test_what_serve_cannot_scale_stops_no_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ScaledWorld(tmp_path)

    def refuse(_: object) -> None:
        raise ClusterError("cannot scale: not there yet")

    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING, rollout="immediate")
        [old] = world.cluster.started
        await world.change(controller, "2", rollout="immediate", replicas=1)
        both = {
            "m": {"version": "2", "rollout": "immediate"},
            "n": {"version": "1", "scaling": SCALING},
        }
        await world.apply(controller, both)
        monkeypatch.setattr(world.cluster, "scale", refuse)
        for _ in range(40):
            with suppress(ClusterError):
                await world.second(controller)
        assert old in world.cluster.deleted

    run(scenario())
