"""What triggers on cost and on GPUs see: through the controller, from counts and reports."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.control.rollout_views import planned, shown
from serving.control.totals import ArmTotals
from serving.core.gpus import XidEvent
from serving.core.rollout_facts import IncidentKind
from serving.core.rollout_spec import default_plan
from serving.core.rollout_types import Outcome, Verdict
from tests.control.gpu_site import FakeGpu, GpuWorld, model
from tests.control.rollout_world import QUICK, RolloutWorld
from tests.control.traffic import Traffic, Version

HALF = {**QUICK, "steps": [{"weight": 20, "hold": 3}, {"weight": 50, "hold": 300}]}
COST = {**HALF, "shadow": False, "analysis": {"min_units": 8, "triggers": {"latency": False}}}


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@dataclass
class PricedWorld(RolloutWorld):
    """Replicas say how long they are up, so that the ledger charges them."""

    def announce(self, controller: Controller) -> None:
        up_ns = int(self.monotonic * 1e9) + 1
        usage = dict.fromkeys(("answered_ns", "padding_ns", "failed_ns", "warmup_ns"), 0)
        for info in self.cluster.announcements():
            controller.announce({**info, "cores": 1, "usage": {**usage, "up_ns": up_ns}})


async def verdict(controller: Controller, trigger: str) -> Verdict:
    record = await controller.rollouts.find("m")
    return next(v for v in record.rollout.verdicts if v.trigger == trigger)


def test_a_canary_that_costs_twice_as_much_is_shown_and_then_pauses(tmp_path: Path) -> None:
    world = PricedWorld(tmp_path, traffic=Traffic(requests_s=16, gateways=1))
    world.traffic.versions["1"] = Version(busy_s=0.001)
    world.traffic.versions["2"] = Version(busy_s=0.002)

    async def scenario() -> None:
        controller = await world.serving(usd_per_hour=3.6)
        await world.change(controller, "2", usd_per_hour=3.6, rollout=COST)
        await world.until(controller, "observing")
        await world.seconds(controller, 2)
        seen = await verdict(controller, "cost")
        assert seen.verdict is Outcome.HOLD
        assert "before the step of 50 %" in seen.sentence
        record = await controller.rollouts.find("m")
        arms = shown(
            record, controller.rollouts.observer.sight(record), controller.rollouts.observer
        )["arms"]
        costs = [arms[arm]["usd_per_1000"] for arm in ("canary", "stable")]
        assert costs == pytest.approx([0.002, 0.001], rel=0.2)
        await world.seconds(controller, 60)
        # What was seen of costs survives the controller.
        controller = await world.controller()
        assert len(controller.rollouts.records[0].costs.closed) > 2
        record = await world.until(controller, "paused", at_most=60)
        assert "cost: canary cost $0.00" in record.rollout.reason
        assert "times in 8 windows (tolerated: 1.05); evidence 10^" in record.rollout.reason
        assert record.rollout.weight == 0.5

    run(scenario())


def test_a_canary_that_costs_as_much_passes(tmp_path: Path) -> None:
    world = PricedWorld(tmp_path, traffic=Traffic(requests_s=16, gateways=1))
    world.traffic.versions["1"] = world.traffic.versions["2"] = Version(busy_s=0.001)

    async def scenario() -> None:
        controller = await world.serving(usd_per_hour=3.6)
        await world.change(controller, "2", usd_per_hour=3.6, rollout=COST)
        await world.until(controller, "observing")
        for _ in range(150):
            await world.second(controller)
            if (seen := await verdict(controller, "cost")).verdict is Outcome.PASS:
                break
        assert seen.verdict is Outcome.PASS, seen.sentence

    run(scenario())


@pytest.fixture
def faulty(tmp_path: Path) -> GpuWorld:
    return GpuWorld(tmp_path, gpus=[FakeGpu("GPU-a"), FakeGpu("GPU-b")])


async def observing(world: GpuWorld, **plan: Any) -> Controller:
    """A canary alone on GPU-b, with traffic."""
    controller = await world.begin({"m": model("1", 10)})
    await world.apply(controller, {"m": model("2", 10, rollout={**HALF, **plan})})
    await world.until(controller, "observing")
    [held] = [x["uuid"] for r, x in world.held.items() if "-v2-" in r] or [""]
    assert held == "GPU-b", world.held
    return controller


def test_an_xid_error_of_the_canarys_program_takes_it_back(faulty: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await observing(faulty)
        assert (await verdict(controller, "gpu_health")).verdict is Outcome.PASS
        faulty.xids = [XidEvent("GPU-a", 31, 2000.0)]
        await faulty.second(controller)
        assert (await verdict(controller, "gpu_health")).verdict is Outcome.PASS
        faulty.xids = [XidEvent("GPU-b", 31, 2001.0)]
        record = await faulty.until(controller, "rolled_back", at_most=5)
        assert record.rollout.reason.startswith(
            "gpu_health: XID 31 (GPU memory page fault) on GPU-b, where only the canary ran"
        )

    run(scenario())


def test_an_xid_error_of_the_hardware_is_shown_and_takes_nothing_back(faulty: GpuWorld) -> None:
    async def scenario() -> None:
        controller = await observing(faulty)
        faulty.xids = [XidEvent("GPU-b", 79, 2000.0), XidEvent("GPU-b", 43, 2000.0)]
        await faulty.seconds(controller, 3)
        seen = await verdict(controller, "gpu_health")
        assert seen.verdict is Outcome.HOLD
        assert "XID 79 (GPU has fallen off the bus), which is the GPU's fault" in seen.sentence
        assert (await controller.rollouts.find("m")).rollout.state == "observing"
        # The next controller has not heard of the errors, and remembers them.
        controller = await faulty.controller()
        kinds = {i.kind for i in controller.rollouts.records[0].incidents}
        assert kinds == {IncidentKind.HARDWARE, IncidentKind.APPLICATION}

    run(scenario())


def test_errors_before_the_canary_was_there_are_not_its_own(faulty: GpuWorld) -> None:
    async def scenario() -> None:
        faulty.xids = [XidEvent("GPU-b", 31, 900.0)]
        controller = await observing(faulty)
        await faulty.seconds(controller, 2)
        assert (await verdict(controller, "gpu_health")).verdict is Outcome.PASS

    run(scenario())


def test_runs_out_of_memory_take_the_canary_back(faulty: GpuWorld) -> None:
    async def scenario() -> None:
        # What its first announcement says was before there were requests.
        faulty.says["2"] = {"oom_batches": 3, "ceiling": 16}
        controller = await observing(faulty)
        await faulty.seconds(controller, 2)
        assert (await verdict(controller, "oom")).verdict is Outcome.PASS
        faulty.says["2"] = {"oom_batches": 5, "ceiling": 8}
        record = await faulty.until(controller, "rolled_back", at_most=5)
        assert record.rollout.reason == (
            "oom: runs of the canary did not fit into memory 2 times in the last 60 s (runs have "
            "at most 8 rows since), 2 are too many: fails"
        )

    run(scenario())


def test_little_memory_left_pauses_where_the_plan_says_so(faulty: GpuWorld) -> None:
    async def scenario() -> None:
        triggers = {"gpu_memory_headroom": {"threshold": 0.3}}
        controller = await observing(faulty, analysis={"min_units": 8, "triggers": triggers})
        seen = await verdict(controller, "gpu_memory_headroom")
        assert seen.verdict is Outcome.PASS, seen.sentence
        faulty.gpus[1].others = int(0.9 * faulty.gpus[1].gib * (1 << 30))
        record = await faulty.until(controller, "paused", at_most=5)
        assert "of its GPU's memory free, at least 30.0 % asked for" in record.rollout.reason

    run(scenario())


def test_what_clients_did_wrong_is_no_failure_of_the_version_that_a_plan_goes_by() -> None:
    totals = ArmTotals(requests={"success": 900, "invalid_request": 900, "overloaded": 100})
    plan = default_plan("canary")
    found = planned("m", "1", "2", plan, requests_per_s=200.0, answers=totals, replicas=1)
    assert "1% of requests fail" in [d["regression"] for d in found["detections"]]
