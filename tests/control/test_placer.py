"""Placement through the controller: what is refused before it starts, and what leases hold."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.control.admin import create_app
from serving.core.gpus import XidEvent
from serving.core.memory_profile import MemoryProfile
from serving.errors import ConflictError, DeviceError, Unavailable
from tests.control.gpu_site import GIB, FakeGpu, GpuWorld, model, shown, where
from tests.control.rollout_world import QUICK


@pytest.fixture
def world(tmp_path: Path) -> GpuWorld:
    return GpuWorld(tmp_path, gpus=[FakeGpu("GPU-a")])


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def names(controller: Any) -> set[str]:
    return set(controller.state.desired.apps())


def test_a_model_that_does_not_fit_is_refused_and_nothing_changes(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 10)})
        before = controller.state
        audit = await controller.readings.audit(after=None, limit=9, subject=None)
        with pytest.raises(ConflictError) as refused:
            await world.apply(controller, {"m": model("1", 10), "n": model("1", 14.2)})
        assert str(refused.value) == (
            "model 'n' version 1 needs 14.2 GiB as gpu_memory_bytes says; the largest free is "
            "14.0 GiB on GPU-a; nothing was changed; stop something, lower replicas or "
            "batching.max_size, or set device: cpu"
        )
        assert controller.state == before
        assert await controller.readings.audit(after=None, limit=9, subject=None) == audit

    run(scenario())


def test_a_dry_run_shows_what_would_be_refused(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 10)})
        asked = {"m": model("1", 10), "n": model("2", 20)}
        plan = await world.apply(controller, asked, dry_run=True)
        new = [row for row in plan["placement"]["models"] if row["new"]]
        assert [(r["model"], r["refused"]) for r in new] == [
            ("n", "needs 20.0 GiB as gpu_memory_bytes says; the largest free is 14.0 GiB on GPU-a")
        ]
        assert where(plan["placement"]) == {("m", "1"): ["GPU-a"], ("n", "2"): []}

    run(scenario())


def test_a_canary_that_does_not_fit_beside_stable_is_refused(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 15, rollout=QUICK)})
        sentence = r"model 'm' version 2 needs 15.0 GiB .* the largest free is 9.0 GiB on GPU-a"
        with pytest.raises(ConflictError, match=sentence):
            await world.apply(controller, {"m": model("2", 15, rollout=QUICK)})
        for ask in (controller.start_rollout, controller.plan_rollout):
            with pytest.raises(ConflictError, match=sentence):
                await ask("m", "2", None)
        assert controller.rollouts.records == ()
        assert await controller.readings.list_rollouts(model="m", active=None, limit=9) == []
        assert len(names(controller)) == 1

    run(scenario())


def test_a_canary_goes_to_another_gpu_than_stable(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
        controller = await world.begin({"m": model("1", 5, rollout=QUICK)})
        stable = where(controller.plan())["m", "1"]
        await world.apply(controller, {"m": model("2", 5, rollout=QUICK)})
        await world.until(controller, "observing")
        after = where(controller.plan())
        assert after["m", "1"] == stable
        assert sorted([*stable, *after["m", "2"]]) == ["GPU-a", "GPU-b"]

    run(scenario())


def test_what_leaves_makes_room_for_what_comes_in_the_same_apply(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20)})
        await world.apply(controller, {"n": model("1", 20)})
        assert [a.replica.model for a in controller.state.desired.apps().values()] == ["n"]

    run(scenario())


def test_what_lost_its_gpu_stops_no_other_apply(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b", 8)]
        controller = await world.begin({"m": model("1", 20)})
        await controller.gpus.cordon("GPU-a", actor="alice", reason="hot")
        controller.placer.book.release(next(iter(world.held)))
        rows = controller.plan()["models"]
        assert rows[0]["refused"].endswith("the largest free is 8.0 GiB on GPU-b (1 cordoned)")
        await world.apply(controller, {"m": model("1", 20), "n": model("1", 5)})
        assert len(names(controller)) == 2

    run(scenario())


def test_the_plan_shows_models_gpus_and_memory(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a", others=2 * GIB, throttle=("hw_slowdown",))]
        cpu = {"version": "1", "device": "cpu"}
        controller = await world.begin({"m": model("1", 10), "c": cpu})
        app = create_app(controller, host="127.0.0.1", ray_version="2.60")
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8002") as c:
            plan = (await c.get("/v1/plan")).json()
        rows = {row["model"]: row for row in plan["models"]}
        replica = next(r for r in world.held if "model-m" in r)
        assert rows["m"]["slots"] == [{"uuid": "GPU-a", "replica": replica}]
        assert (rows["m"]["bytes"], rows["m"]["estimated"]) == (10 * GIB, False)
        assert (rows["c"]["bytes"], rows["c"]["slots"]) == (None, [])
        gpu = shown(plan, "GPU-a")
        sizes = {k: gpu[f"{k}_bytes"] // GIB for k in ("memory", "leased", "others", "free")}
        assert sizes == {"memory": 24, "leased": 10, "others": 2, "free": 12}
        assert (gpu["throttled"], gpu["cordoned"]) == (True, False)

    run(scenario())


def test_slices_stand_for_a_divided_gpu(world: GpuWorld) -> None:
    async def scenario() -> None:
        whole = FakeGpu("GPU-a", 80, divided=True)
        part = FakeGpu("MIG-a1", 10, name="A100 MIG 1g.10gb", mig_parent="GPU-a")
        world.gpus = [whole, part]
        controller = await world.begin({"m": model("1", 8)})
        assert where(controller.plan())["m", "1"] == ["MIG-a1"]
        with pytest.raises(ConflictError, match=r"the largest free is 2.0 GiB on MIG-a1"):
            await world.apply(controller, {"m": model("1", 8), "n": model("1", 8)})

    run(scenario())


def test_a_gpu_that_failed_gets_nothing_new(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
        controller = await world.begin({})
        await controller.gpus.report(
            {
                **_report(world),
                "xids": [XidEvent("GPU-a", 79, 1.0).to_dict()],
            }
        )
        await world.apply(controller, {"m": model("1", 8)})
        assert where(controller.plan())["m", "1"] == ["GPU-b"]

    run(scenario())


def _report(world: GpuWorld) -> dict[str, Any]:
    from serving.core.gpus import NodeReport

    return NodeReport("node", "node", gpus=tuple(g.report() for g in world.gpus)).to_dict()


def test_an_estimate_is_replaced_by_what_was_measured(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": {"version": "1"}})
        row = controller.plan()["models"][0]
        assert (row["estimated"], row["basis"]) == (
            True,
            "for max_size 64, estimated from nothing: its files are not here",
        )
        assert shown(controller.plan(), "GPU-a")["leased_bytes"] == row["bytes"] > GIB
        measured = MemoryProfile("NVIDIA L4", "torch", 300 << 20, 100 << 20, {64: 50 << 20})
        world.profile = measured.to_dict()
        await world.seconds(controller, 2)
        row = controller.plan()["models"][0]
        assert (row["estimated"], row["basis"]) == (False, "for max_size 64")
        assert row["bytes"] == measured.need(64, 0.1)
        assert shown(controller.plan(), "GPU-a")["leased_bytes"] == row["bytes"]
        # Another controller knows it before any replica has said so.
        later = await world.controller()
        await world.measure(later)
        assert later.plan()["models"][0]["bytes"] == measured.need(64, 0.1)

    run(scenario())


def test_a_ceiling_learned_with_an_estimate_does_not_bind_what_was_measured(
    world: GpuWorld,
) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": {"version": "1"}})
        app = next(iter(names(controller)))
        first, estimate = world.cluster.announcements()[0], next(iter(world.held.values()))["bytes"]
        # The warm-up ran out of what was estimated; its profile tells what larger runs will take.
        measured = MemoryProfile("NVIDIA L4", "torch", 300 << 20, 500 << 20, {16: 600 << 20})
        profile = {"profile": measured.to_dict()}
        told = {**first, **profile, "lease_bytes": estimate, "ceiling": 16}
        controller.announce(told)
        assert controller.plan()["models"][0]["ceilings"] == {"NVIDIA L4": 16}
        lease = controller.lease_gpu(app, "another", "node", 7)
        assert lease is not None
        assert lease["bytes"] == measured.need(64, 0.1) > estimate
        assert lease["ceiling"] is None
        fits = {**told, "replica": "another", "lease_bytes": lease["bytes"], "ceiling": None}
        controller.announce(fits)
        controller.announce(told)
        assert controller.plan()["models"][0]["ceilings"] == {}

    run(scenario())


def test_a_learned_ceiling_goes_with_the_next_lease(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": {"version": "1"}})
        app = next(iter(names(controller)))
        held = next(iter(world.held.values()))
        info = {**world.cluster.announcements()[0], "ceiling": 24, "lease_bytes": held["bytes"]}
        profile = MemoryProfile("NVIDIA L4", "torch", 1, 1, {64: 1}).to_dict()
        controller.announce({**info, "profile": profile})
        controller.announce({**info, "profile": profile, "ceiling": 32})
        lease = controller.lease_gpu(app, "another", "node", 7)
        assert lease is not None
        assert lease["ceiling"] == 24
        assert controller.plan()["models"][0]["ceilings"] == {"NVIDIA L4": 24}

    run(scenario())


def test_leases_outlive_the_controller(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 10)})
        before = controller.plan()
        later = await world.controller()
        with pytest.raises(Unavailable, match="just restarted"):
            later.lease_gpu(next(iter(names(controller))), "new", "node", 7)
        await world.seconds(later, 2)
        assert later.plan() == before

    run(scenario())


def test_a_replica_that_failed_or_fell_silent_gives_its_share_back(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 10), "n": model("1", 10)})
        assert shown(controller.plan(), "GPU-a")["leased_bytes"] == 20 * GIB
        info = next(i for i in world.cluster.announcements() if i["model"] == "n")
        controller.announce({**info, "state": "failed", "error": "it does not load"})
        assert shown(controller.plan(), "GPU-a")["leased_bytes"] == 10 * GIB
        world.cluster.silent = {"1"}
        await world.seconds(controller, 10)
        assert controller.placer.book.leases == []

    run(scenario())


def test_a_replica_without_room_hears_the_numbers(world: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await world.begin({"m": model("1", 20)})
        app = next(iter(names(controller)))
        with pytest.raises(DeviceError) as refused:
            controller.lease_gpu(app, "another", "node", 7)
        assert str(refused.value) == (
            "model 'm' version 1 on node node: needs 20.0 GiB as gpu_memory_bytes says; "
            "the largest free is 4.0 GiB on GPU-a"
        )

    run(scenario())


def test_memory_of_other_processes_is_not_given_away(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a", others=20 * GIB)]
        controller = await world.begin({})
        with pytest.raises(ConflictError, match=r"the largest free is 4.0 GiB"):
            await world.apply(controller, {"m": model("1", 5)})

    run(scenario())


def test_without_gpus_everything_is_as_it_was(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = []
        controller = await world.begin({"m": {"version": "1"}, "n": model("1", 99)})
        assert all(lease == {} for lease in world.held.values())
        assert len(names(controller)) == 2
        rows = controller.plan()["models"]
        assert [row["refused"] for row in rows] == [None, None]

    run(scenario())


def test_a_replica_waits_until_ray_has_said_which_nodes_have_gpus(world: GpuWorld) -> None:
    async def scenario() -> None:
        await world.begin({"m": {"version": "1"}})
        controller = await world.controller()
        # As it is just after its start.
        controller.gpus.counted = False
        await world.seconds(controller, 10)
        app = next(iter(names(controller)))
        with pytest.raises(Unavailable, match="Ray has not said yet which nodes have GPUs"):
            controller.lease_gpu(app, "another", "node", 7)

    run(scenario())


def test_a_replica_waits_until_the_gpus_are_known(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = []
        controller = await world.begin({"m": {"version": "1"}})
        app = next(iter(names(controller)))
        controller.gpus.expect({"node": 1.0})
        with pytest.raises(Unavailable, match="the GPUs of node are not known yet"):
            controller.lease_gpu(app, "another", "node", 7)

    run(scenario())


@pytest.mark.parametrize("wants", [{}, {"device": "cuda"}, {"gpu_memory_bytes": 1 << 30}])
def test_a_gpu_without_memory_of_its_own_gets_nothing_and_says_so(
    world: GpuWorld, wants: dict[str, Any]
) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a", 0)]
        controller = await world.begin({"c": {"version": "1", "device": "cpu"}})
        with pytest.raises(ConflictError) as refused:
            await world.apply(controller, {"m": {"version": "1", **wants}})
        assert "; GPU-a reports no memory of its own to place it by; nothing was" in str(
            refused.value
        )
        assert str(refused.value).endswith("or set device: cpu")
        gpu = shown(controller.plan(), "GPU-a")
        assert (gpu["memory_bytes"], gpu["free_bytes"]) == (None, 0)

    run(scenario())


def test_beside_a_gpu_without_memory_of_its_own_others_are_used(world: GpuWorld) -> None:
    async def scenario() -> None:
        world.gpus = [FakeGpu("GPU-a", 0), FakeGpu("GPU-b")]
        controller = await world.begin({"m": model("1", 20)})
        assert where(controller.plan()) == {("m", "1"): ["GPU-b"]}
        asked = {"m": model("1", 20), "n": model("1", 20)}
        with pytest.raises(ConflictError, match=r"the largest free is 4.0 GiB on GPU-b; nothing"):
            await world.apply(controller, asked)

    run(scenario())


def test_what_ran_before_all_gpus_were_without_memory_of_their_own_says_why(
    world: GpuWorld,
) -> None:
    async def scenario() -> None:
        world.gpus = []
        controller = await world.begin({"m": model("1", 20)})
        world.gpus = [FakeGpu("GPU-a", 0), FakeGpu("GPU-b", 0)]
        await world.measure(controller)
        [app] = names(controller)
        with pytest.raises(DeviceError, match="GPU-a, GPU-b report no memory of their own"):
            controller.lease_gpu(app, "another", "node", 7)

    run(scenario())
