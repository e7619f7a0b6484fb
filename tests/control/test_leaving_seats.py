"""Seats that leave take their time, and others come meanwhile: neither is taken for the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.control.controller import Controller
from serving.core.seats import Seat
from tests.control.gpu_site import GIB, FakeGpu, GpuWorld, model
from tests.control.test_mover import cordon, on, routed, run, seats
from tests.control.test_scaler import ScaledWorld, asleep, shown
from tests.control.world import gateway_report


@pytest.fixture
def world(tmp_path: Path) -> GpuWorld:
    return GpuWorld(tmp_path, gpus=[FakeGpu(f"GPU-{n}", node=f"node-{n}") for n in "abc"])


async def uncordon(controller: Controller, uuid: str) -> None:
    await controller.gpus.uncordon(uuid, actor="alice", reason="quiet")


def sends_by_old_routes(controller: Controller) -> None:
    """A gateway that has not left the first route table: what leaves is not done."""
    controller.report(gateway_report("slow", 0))


class Failures:
    """What replicas said about their failed starts."""

    def __init__(self) -> None:
        self.heard: set[str] = set()

    def look(self, controller: Controller) -> None:
        self.heard |= {str(r.info) for r in controller.fleet.replicas() if r.state == "failed"}


def test_a_seat_has_no_number_of_one_that_is_still_remembered(world: GpuWorld) -> None:
    world.gpus.append(FakeGpu("GPU-d", node="node-d"))

    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20, replicas=2)})
        [app] = world.cluster.seats
        [first] = (x for x in controller.placer.book.leases if x.replica.endswith("#0"))
        world.cluster.slow = world.cluster.mute = {f"{app}.2"}
        await cordon(controller, first.terms.uuid)
        await world.seconds(controller, 2)
        await uncordon(controller, first.terms.uuid)
        world.cluster.slow = set()
        await world.seconds(controller, 2)
        assert f"{app}.2" in world.cluster.deleted, "it was ready, and is not needed any more"
        await cordon(controller, first.terms.uuid)
        await world.seconds(controller, 8)
        assert list(seats(world)) == [f"{app}.1", f"{app}.3"]
        assert world.cluster.deleted.count(f"{app}.2") == 1
        assert len(routed(controller)) == 2
        assert first.terms.uuid not in on(controller)

    run(scenario())


def test_what_wakes_is_not_taken_for_what_fell_asleep(tmp_path: Path) -> None:
    world = ScaledWorld(tmp_path, gpus=[FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    scaling = {"min": 0, "max": 2, "scale_down_after": "5s", "idle_to_zero_after": "5s"}

    async def scenario() -> None:
        settings = {"gpu_memory_bytes": 10 * GIB, "scaling": scaling}
        controller = await world.begin({"m": {"version": "1", **settings}})
        [app] = world.cluster.started
        world.cluster.mute = {f"{app}.0"}
        world.traffic.requests_s = 0
        for _ in range(40):
            await world.second(controller)
            if f"{app}.0" in world.cluster.deleted:
                break
        assert shown(controller)["state"] == "asleep"
        for _ in range(4):
            controller.report(asleep(2, controller.board.revision))
            await world.second(controller)
        assert len(routed(controller)) == 1
        assert world.cluster.deleted.count(f"{app}.0") == 1

    run(scenario())


def test_what_comes_while_another_leaves_has_a_node_and_a_share(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20, replicas=2)})
        [app] = world.cluster.seats
        places = {x.replica[-1]: x for x in controller.placer.book.leases}
        world.look = sends_by_old_routes
        await cordon(controller, places["0"].terms.uuid)
        await world.seconds(controller, 4)
        assert list(seats(world)) == [f"{app}.0", f"{app}.1", f"{app}.2"]
        assert len(routed(controller)) == 2, "the first one leaves"
        world.cluster.delete([f"{app}.1"])
        await world.seconds(controller, 3)
        assert seats(world)[f"{app}.3"] == Seat(3, places["1"].node, 0.4166)
        [row] = controller.plan()["models"]
        held = {s["replica"]: s["uuid"] for s in row["slots"]}
        assert held[f"{app}#3"] == places["1"].terms.uuid
        assert f"{app}#0" not in held, "its share is on its way back"

    run(scenario())


def test_a_replica_waits_for_the_room_of_one_that_leaves(world: GpuWorld) -> None:
    world.gpus = world.gpus[:2]

    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20)})
        [app] = world.cluster.seats
        [old] = on(controller)
        [other] = {"GPU-a", "GPU-b"} - {old}
        await cordon(controller, old)
        failures = Failures()

        def both(controller: Controller) -> None:
            failures.look(controller)
            sends_by_old_routes(controller)

        world.look = both
        await world.seconds(controller, 4)
        assert on(controller) == ["GPU-a", "GPU-b"]
        await uncordon(controller, old)
        await cordon(controller, other)
        world.cluster.delete([f"{app}.1"])
        await world.seconds(controller, 4)
        assert on(controller) == [old], "held by the one that leaves"
        assert seats(world)[f"{app}.2"] == Seat(2, f"node-{old[-1]}", 0.4166)
        world.look = failures.look
        await world.seconds(controller, 10)
        assert failures.heard == set()
        assert list(seats(world)) == [f"{app}.2"]
        assert on(controller) == [old]
        assert routed(controller) == {f"{app}#2"}

    run(scenario())
