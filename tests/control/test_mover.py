"""What runs on a GPU that is cordoned goes on elsewhere, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.control.gpu_views import gpus_view
from serving.control.placer import UNHEARD_PATIENCE_S
from serving.control.status import status
from serving.core.gpus import NodeReport, XidEvent
from serving.core.seats import Seat
from tests.control.gpu_site import FakeGpu, GpuWorld, model, where
from tests.control.rollout_world import QUICK


@pytest.fixture
def world(tmp_path: Path) -> GpuWorld:
    return GpuWorld(tmp_path, gpus=[FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c")])


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def routed(controller: Controller) -> set[str]:
    """The replicas that gateways send to."""
    return {e.replica for e in controller.board.table.models["m"].arms["1"].endpoints}


def on(controller: Controller) -> list[str]:
    return sorted(lease.terms.uuid for lease in controller.placer.book.leases)


def seats(world: GpuWorld) -> dict[str, Seat]:
    (found,) = world.cluster.seats.values()
    return found


def never_fewer(count: int) -> Callable[[Controller], None]:
    def look(controller: Controller) -> None:
        assert len(routed(controller)) >= count

    return look


async def cordon(controller: Controller, uuid: str) -> None:
    await controller.gpus.cordon(uuid, actor="alice", reason="loud")


def test_the_replacement_is_ready_and_routed_before_the_old_one_leaves(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20, replicas=2)})
        assert on(controller) == ["GPU-a", "GPU-b"]
        before, world.look = routed(controller), never_fewer(2)
        await cordon(controller, "GPU-a")
        (old,) = (x.replica for x in controller.placer.book.on("GPU-a"))
        new = next(iter(seats(world))).rpartition(".")[0] + ".2"
        world.cluster.slow = {new}
        await world.seconds(controller, 5)
        assert new in seats(world)
        assert routed(controller) == before, "the replacement is not ready"
        world.cluster.slow = set()
        await world.second(controller)
        assert routed(controller) >= before - {old}
        await world.seconds(controller, 4)
        assert on(controller) == ["GPU-b", "GPU-c"]
        assert len(seats(world)) == 2
        assert old not in routed(controller)
        assert len(routed(controller)) == 2
        assert controller.reconciler.outcome == "converged"

    run(scenario())


def test_an_error_of_the_hardware_moves_all_that_run_there(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 10), "n": model("1", 8)})
        (uuid,) = {x.terms.uuid for x in controller.placer.book.leases if x.app[6] == "m"}
        await _raise_xid(world, controller, uuid)
        await world.seconds(controller, 8)
        assert len(on(controller)) == 2
        assert uuid not in on(controller)

    run(scenario())


def test_a_canary_that_moves_is_no_crash_loop(world: GpuWorld) -> None:
    """Twice within the window of restarts: its replicas came in new seats each time."""

    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20)})
        plan = {**QUICK, "steps": [{"weight": 20, "hold": 60}]}
        await world.apply(controller, {"m": model("2", 20, rollout=plan)})
        await world.until(controller, "observing")

        async def evicted() -> None:
            [lease] = [x for x in controller.placer.book.leases if "-v2-" in x.app]
            await cordon(controller, lease.terms.uuid)
            world.gpus.append(FakeGpu(f"GPU-{len(world.gpus)}"))
            await world.seconds(controller, 8)
            [moved] = [x for x in controller.placer.book.leases if "-v2-" in x.app]
            assert moved.terms.uuid != lease.terms.uuid

        await evicted()
        await evicted()
        rollout = (await controller.rollouts.find("m")).rollout
        assert (rollout.state.value, rollout.restarts) == ("observing", ())

    run(scenario())


async def _raise_xid(world: GpuWorld, controller: Controller, uuid: str) -> None:
    gpus = tuple(gpu.report() for gpu in world.gpus)
    report = NodeReport("node", "node", gpus=gpus, xids=(XidEvent(uuid, 79, 1.0),))
    await controller.gpus.report(report.to_dict())


def test_without_room_it_stays_says_so_and_moves_once_there_is_some(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
        controller = await world.begin({"m": model("1", 20, replicas=2)})
        started, before = list(seats(world)), routed(controller)
        await cordon(controller, "GPU-a")
        await world.seconds(controller, 6)
        assert (routed(controller), list(seats(world))) == (before, started)
        (row,) = controller.plan()["models"]
        assert row["stays"] == (
            "needs 20.0 GiB as gpu_memory_bytes says; the largest free is 4.0 GiB on GPU-b "
            "(1 cordoned)"
        )
        view = gpus_view(controller.gpus, lambda _: None, controller.placer.stays)["gpus"]
        assert [[r["stays"] for r in gpu["replicas"]] for gpu in view] == [[row["stays"]], [None]]
        (version,) = status(controller)["models"][0]["versions"]
        assert version["last_error"] == f"it stays on a cordoned GPU: {row['stays']}"
        assert not controller.mover.due
        world.gpus.append(FakeGpu("GPU-c"))
        await world.seconds(controller, 8)
        assert on(controller) == ["GPU-b", "GPU-c"]
        assert controller.plan()["models"][0]["stays"] is None

    run(scenario())


def test_what_is_called_off_takes_the_replacement_back(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20, replicas=2)})
        before, world.look = routed(controller), never_fewer(2)
        (app,) = world.cluster.seats
        world.cluster.slow = {f"{app}.2"}
        await cordon(controller, "GPU-a")
        await world.seconds(controller, 2)
        assert f"{app}.2" in seats(world)
        await controller.gpus.uncordon("GPU-a", actor="alice", reason="quiet")
        await world.seconds(controller, 4)
        assert list(seats(world)) == [f"{app}.0", f"{app}.1"]
        assert routed(controller) == before

    run(scenario())


@pytest.mark.parametrize("after_s", range(8))
def test_another_controller_goes_on_with_a_move(world: GpuWorld, after_s: int) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20, replicas=2)})
        world.look = never_fewer(2)
        await cordon(controller, "GPU-b")
        await world.seconds(controller, after_s)
        controller = await world.controller()
        controller.gpus.expect({"node": 3.0})
        # It hears replicas before it hears of GPUs.
        gpus, world.gpus = world.gpus, []
        await world.seconds(controller, 3)
        world.gpus = gpus
        await world.seconds(controller, 14)
        (app,) = world.cluster.seats
        assert f"{app}.2" not in world.cluster.deleted, "the move was not called off"
        assert on(controller) == ["GPU-a", "GPU-c"]
        assert len(seats(world)) == len(routed(controller)) == 2

    run(scenario())


def test_replicas_start_on_the_nodes_they_are_planned_for(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a", node="one"), FakeGpu("GPU-b", 80, node="two")]
        controller = await world.controller()
        controller.gpus.expect({"one": 1.0, "two": 1.0})
        await world.measure(controller)
        await world.apply(controller, {"m": model("1", 18, replicas=2), "n": model("1", 60)})
        await world.seconds(controller, 4)
        placed = {app[6]: set(of.values()) for app, of in world.cluster.seats.items()}
        assert placed["n"] == {Seat(0, "two", 0.375)}
        assert {(s.node, s.num_gpus) for s in placed["m"]} == {("one", 0.375), ("two", 0.1125)}
        assert where(controller.plan())["m", "1"] == ["GPU-b", "GPU-a"]

    run(scenario())


def test_a_replica_that_died_with_the_last_gpu_of_its_node_is_replaced_on_another(
    world: GpuWorld,
) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a", node="one"), FakeGpu("GPU-b", 22, node="two")]
        controller = await world.begin({"m": model("1", 20), "n": model("1", 20)})
        (died,) = (x for x in controller.placer.book.leases if x.app[6] == "m")
        # It ends, and Serve starts another one in the same seat.
        await controller.gpus.cordon(died.terms.uuid, actor="controller", reason="XID 79")
        controller.placer.book.release(died.replica)
        world.cluster.generation["1"] = 1
        await world.seconds(controller, 4)
        assert controller.plan()["models"][0]["refused"], "n has the room"
        world.gpus.append(FakeGpu("GPU-c", node="three"))
        await world.seconds(controller, 12)
        assert "GPU-c" in on(controller)
        assert [s.node for s in seats_of(world, "m").values()] == ["three"]

    run(scenario())


def test_applications_wait_a_little_for_gpus_that_ray_counts(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        controller.gpus.expect({"node": 1.0})
        await world.apply(controller, {"m": model("1", 10), "c": model("1", 10, device="cpu")})
        await controller.step(look=True)
        assert [name[6] for name in world.cluster.started] == ["c"]
        world.monotonic += UNHEARD_PATIENCE_S + 1
        await controller.step(look=True)
        assert [name[6] for name in world.cluster.started] == ["c", "m"]
        assert list(seats_of(world, "m").values()) == [Seat(0)]
        assert seats_of(world, "c") == {}

    run(scenario())


def seats_of(world: GpuWorld, name: str) -> dict[str, Seat]:
    return next(of for app, of in world.cluster.seats.items() if app[6] == name)
