"""Scaling through the controller: what it reads of the load, keeps, and tells the cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serving.cli.render import show_view, status_view
from serving.control.controller import Controller
from serving.control.metrics import exposition
from serving.control.status import status
from tests.control.gpu_site import GIB, FakeGpu, GpuWorld
from tests.control.rollout_world import QUICK
from tests.control.world import gateway_report, model_row

SCALING: dict[str, Any] = {"max": 4, "scale_down_after": "5s"}


@dataclass
class ScaledWorld(GpuWorld):
    """Versions whose replicas share `busy` replicas' work, and take turns at it."""

    busy: dict[str, float] = field(default_factory=dict)
    ran_ns: Counter[str] = field(default_factory=Counter)
    up_ns: Counter[str] = field(default_factory=Counter)

    def announce(self, controller: Controller) -> None:
        found = self.cluster.announcements()
        for info in found:
            same = sum(other["app"] == info["app"] for other in found)
            replica = info["replica"]
            if info["state"] == "draining":
                controller.announce(info)
                controller.placer.book.release(replica)
                self.held.pop(replica, None)
                continue
            self.up_ns[replica] += 10**9
            self.ran_ns[replica] += int(min(1.0, self.busy.get(info["version"], 0.0) / same) * 1e9)
            usage = dict.fromkeys(("padding_ns", "failed_ns", "warmup_ns"), 0)
            usage |= {"up_ns": self.up_ns[replica], "answered_ns": self.ran_ns[replica]}
            if self.gpus and replica not in self.held:
                lease = controller.lease_gpu(info["app"], replica, "node", info["pid"])
                self.held[replica] = lease or {}
            lease = self.held.get(replica, {})
            gpu = {"gpu": lease.get("uuid"), "lease_bytes": lease.get("bytes")}
            controller.announce({**info, **gpu, "usage": usage, "cores": 1})

    def wanted(self, controller: Controller, version: str = "1") -> int:
        return int(shown(controller, version)["wanted"])


@pytest.fixture
def world(tmp_path: Path) -> ScaledWorld:
    return ScaledWorld(tmp_path)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def shown(controller: Controller, version: str = "1") -> dict[str, Any]:
    [found] = [m for m in status(controller)["models"] if m["name"] == "m"]
    return next(v for v in found["versions"] if v["version"] == version)


async def entries(controller: Controller) -> list[tuple[int, int]]:
    rows = await controller.readings.audit(after=None, limit=50, subject="m")
    return [(r["body"]["from"], r["body"]["to"]) for r in rows if r["action"] == "scale"]


def test_replicas_follow_the_load_in_the_same_application(
    world: ScaledWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING)
        assert (shown(controller)["state"], world.wanted(controller)) == ("ready", 1)
        world.busy["1"] = 1.3
        await world.seconds(controller, 10)
        assert world.wanted(controller) == 2
        found = shown(controller)
        assert (found["state"], found["ready"]) == ("ready", 2)
        assert found["scaling"]["busy"] == pytest.approx(1.3, abs=0.1)
        assert "of 2 replicas busy" in found["scaling"]["reason"]
        assert len(controller.board.table.models["m"].arms["1"].endpoints) == 2
        show_view(status_view(status(controller)))
        assert "m version 1: 2 replicas (1 to 4): queue delay" in capsys.readouterr().out
        text = exposition(controller, "x").decode()
        assert 'serving_replicas{model="m",state="wanted",version="1"} 2.0' in text
        assert 'serving_scaling_busy_replicas{model="m",version="1"} 1.' in text
        assert 'serving_scaling_queue_delay_seconds{model="m",version="1"} 0.00' in text

        world.busy["1"] = 0.1
        await world.seconds(controller, 20)
        assert world.wanted(controller) == 1
        assert await entries(controller) == [(1, 2), (2, 1)]
        # One application from the beginning, told of each change once.
        assert world.cluster.started == [found["app"]]
        assert world.cluster.deleted == []
        assert [n for _, n in world.cluster.scaled] == [2, 1]
        assert controller.reconciler.settled

    run(scenario())


def test_the_number_outlives_the_controller(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING)
        world.busy["1"] = 1.3
        await world.seconds(controller, 10)
        world.cluster.scaled.clear()
        successor = await world.controller()
        assert world.wanted(successor) == 2
        await world.seconds(successor, 8)
        assert world.wanted(successor) == 2
        # Serve may have heard of it or not: it is told once more.
        assert [n for _, n in world.cluster.scaled] == [2]

    run(scenario())


def test_new_settings_change_no_application(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING)
        plan = await world.change(controller, "1", scaling={"min": 2, "max": 3})
        assert [(c["change"], c["reason"]) for c in plan["changes"]] == [
            ("scale", "1 to 4 -> 2 to 3 replicas; changed: scaling")
        ]
        await world.seconds(controller, 4)
        assert shown(controller)["ready"] == 2
        assert len(world.cluster.started) == 1

    run(scenario())


def test_what_takes_over_begins_with_as_many_replicas(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING, rollout="immediate")
        world.busy["1"] = 2.5
        await world.seconds(controller, 20)
        assert world.wanted(controller) == 4
        await world.change(controller, "2", scaling=SCALING, rollout="immediate")
        assert world.wanted(controller, "2") == 4
        await world.second(controller)
        [new] = [a for a in world.cluster.apps.values() if a.replica.version == "2"]
        assert new.count == 4
        await world.seconds(controller, 6)
        assert controller.board.table.models["m"].version == "2"
        assert world.wanted(controller, "2") == 4

    run(scenario())


def test_both_arms_of_a_rollout_keep_full_capacity(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING)
        world.busy["1"] = 1.9
        await world.seconds(controller, 12)
        assert world.wanted(controller) == 3
        await world.change(controller, "2", scaling=SCALING)
        world.busy["1"] = 0.1  # enough for one, and for longer than the cool-down
        for _ in range(60):
            await world.second(controller)
            record = await controller.rollouts.find("m")
            if not record.rollout.active:
                break
            assert world.wanted(controller, "1") == 3
            if record.rollout.state != "pending" and record.rollout.state != "preparing":
                assert shown(controller, "2")["ready"] == 3
        assert record.rollout.state == "succeeded", record.rollout.reason
        # A rollback starts nothing: the old version stays as it is while it is kept.
        while "1" in controller.state.desired.models["m"].versions:
            assert world.wanted(controller, "1") == 3
            await world.second(controller)
        await world.seconds(controller, 6)
        assert world.wanted(controller, "2") == 1

    run(scenario())


def test_a_canary_that_grows_does_not_crash(world: ScaledWorld) -> None:
    """Its new replicas are no restarts: crash_loop would take it back."""

    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING)
        held = {**QUICK, "steps": [{"weight": 20, "hold": 30}], "bake": {"duration": 4}}
        await world.change(controller, "2", scaling=SCALING, rollout=held)
        await world.until(controller, "observing")
        world.busy["2"] = 2.5
        await world.seconds(controller, 20)
        assert world.wanted(controller, "2") == world.wanted(controller, "1") == 4
        record = await controller.rollouts.find("m")
        assert record.rollout.state == "observing", record.rollout.reason
        assert record.rollout.restarts == ()

    run(scenario())


def asleep(waiting: int, revision: int) -> dict[str, Any]:
    rows = [model_row("1", 0, waiting=waiting, queue_depth=waiting)]
    return gateway_report("g9", revision, rows)


def test_one_that_sleeps_is_woken_by_the_report_of_a_waiting_request(world: ScaledWorld) -> None:
    async def scenario() -> None:
        scaling = {"min": 0, "max": 2, "idle_to_zero_after": "5s", "wake_queue": 7}
        controller = await world.serving(scaling=scaling)
        world.traffic.requests_s = 0
        await world.seconds(controller, 16)
        found = shown(controller)
        assert (found["state"], found["wanted"], found["ready"]) == ("asleep", 0, 0)
        assert found["scaling"]["reason"] == "asleep: a request wakes it"
        arm = controller.board.table.models["m"].arms["1"]
        assert (arm.endpoints, arm.wake_queue) == ((), 7)
        assert status(controller)["apply"]["state"] == "converged"

        controller.report(asleep(0, controller.board.revision))
        await controller.step(look=False)
        assert world.wanted(controller) == 0
        controller.report(asleep(2, controller.board.revision))
        # No time has passed: it does not wait for the next tick.
        await controller.step(look=False)
        assert shown(controller)["state"] == "waking"
        assert world.cluster.scaled[-1][1] == 1
        await world.second(controller)
        assert shown(controller)["state"] == "ready"
        assert (await entries(controller))[-2:] == [(1, 0), (0, 1)]

    run(scenario())


def test_none_sleeps_while_a_request_runs(world: ScaledWorld) -> None:
    async def scenario() -> None:
        scaling = {"min": 0, "max": 2, "idle_to_zero_after": "5s"}
        controller = await world.serving(scaling=scaling)
        world.traffic.requests_s = 0
        for in_flight, seconds, state in ((1, 20, "ready"), (0, 12, "asleep")):
            for _ in range(seconds):
                rows = [model_row("1", 0, in_flight=in_flight)]
                controller.report(gateway_report("g9", controller.board.revision, rows))
                await world.second(controller)
            assert shown(controller)["state"] == state

    run(scenario())


@pytest.mark.parametrize("slug", ["unauthenticated", "forbidden", "budget_spent"])
def test_refused_requests_neither_wake_nor_keep_awake(world: ScaledWorld, slug: str) -> None:
    async def scenario() -> None:
        scaling = {"min": 0, "max": 2, "idle_to_zero_after": "5s"}
        controller = await world.serving(scaling=scaling)
        world.traffic.requests_s = 0
        for second in range(30):
            rows = [model_row("1", 0, requests={slug: second})]
            controller.report(gateway_report("g9", controller.board.revision, rows))
            await world.second(controller)
            assert second < 20 or shown(controller)["state"] == "asleep"

    run(scenario())


def test_a_rollout_wakes_what_sleeps(world: ScaledWorld) -> None:
    async def scenario() -> None:
        scaling = {"min": 0, "max": 2, "idle_to_zero_after": "5s"}
        controller = await world.serving(scaling=scaling)
        requests, world.traffic.requests_s = world.traffic.requests_s, 0
        await world.seconds(controller, 16)
        assert shown(controller)["state"] == "asleep"
        await world.change(controller, "2", scaling=scaling)
        await world.until(controller, "shadowing")
        assert shown(controller, "1")["ready"] == shown(controller, "2")["ready"] == 1
        # Nobody asks for longer than it takes to fall asleep.
        await world.seconds(controller, 12)
        assert shown(controller, "1")["ready"] == shown(controller, "2")["ready"] == 1
        world.traffic.requests_s = requests
        await world.until(controller, "succeeded")

    run(scenario())


def test_no_more_replicas_than_gpus_have_room_for(tmp_path: Path) -> None:
    world = ScaledWorld(tmp_path, gpus=[FakeGpu("GPU-a")])

    async def scenario() -> None:
        settings = {"gpu_memory_bytes": 10 * GIB, "scaling": {"max": 8, "scale_down_after": "5s"}}
        controller = await world.begin({"m": {"version": "1", **settings}})
        world.busy["1"] = 8.0
        await world.seconds(controller, 30)
        found = shown(controller)
        assert (found["wanted"], found["ready"]) == (2, 2)
        assert (
            "no room for 3: needs 10.0 GiB as gpu_memory_bytes says" in found["scaling"]["reason"]
        )
        assert (await entries(controller)) == [(1, 2)]

    run(scenario())


def test_on_gpus_seats_come_and_go_one_by_one(tmp_path: Path) -> None:
    world = ScaledWorld(tmp_path, gpus=[FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    scaling = {"min": 0, "max": 4, "scale_down_after": "5s", "idle_to_zero_after": "5s"}

    async def scenario() -> None:
        settings = {"gpu_memory_bytes": 10 * GIB, "scaling": scaling}
        controller = await world.begin({"m": {"version": "1", **settings}})
        [app] = world.cluster.started
        world.busy["1"] = 1.3
        await world.seconds(controller, 12)
        assert (shown(controller)["wanted"], shown(controller)["ready"]) == (2, 2)
        assert len(world.cluster.seats[app]) == 2
        world.busy["1"] = 0.1
        await world.seconds(controller, 20)
        assert (shown(controller)["wanted"], shown(controller)["ready"]) == (1, 1)
        assert list(world.cluster.seats[app]) == [f"{app}.0"]
        assert world.cluster.deleted == [f"{app}.1"]

        world.busy["1"] = 0.0
        world.traffic.requests_s = 0
        await world.seconds(controller, 20)
        assert shown(controller)["state"] == "asleep"
        assert not world.cluster.seats[app]
        assert world.held == {}
        # Serve knows nothing of it any more, and it stays asleep.
        assert not world.cluster.phases
        await world.seconds(controller, 3)
        assert shown(controller)["state"] == "asleep"
        assert world.cluster.started == [app]

        controller.report(asleep(2, controller.board.revision))
        await controller.step(look=False)
        await world.seconds(controller, 2)
        assert (shown(controller)["state"], shown(controller)["ready"]) == ("ready", 1)
        assert world.cluster.started == [app, app]
        # Serve is never told of a number: each seat is an application of its own.
        assert world.cluster.scaled == []

    run(scenario())


def test_a_fixed_number_stays_fixed(world: ScaledWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(replicas=2)
        world.busy["1"] = 2.0
        await world.seconds(controller, 15)
        found = shown(controller)
        assert (found["wanted"], found["scaling"]) == (2, None)
        assert world.cluster.scaled == []

    run(scenario())


def test_on_gpus_without_memory_of_their_own_the_number_stays_and_says_why(tmp_path: Path) -> None:
    world = ScaledWorld(tmp_path)

    async def scenario() -> None:
        controller = await world.serving(scaling=SCALING)
        world.gpus = [FakeGpu("GPU-a", 0)]
        world.held = {r.endpoint.replica: {} for r in controller.fleet.replicas()}
        world.busy["1"] = 2.5
        await world.seconds(controller, 10)
        assert (world.wanted(controller), shown(controller)["ready"]) == (1, 1)
        reason = shown(controller)["scaling"]["reason"]
        assert reason.endswith("; GPU-a reports no memory of its own to place it by")
        assert "no room for 2: needs" in reason

    run(scenario())
