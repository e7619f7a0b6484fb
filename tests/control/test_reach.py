"""How long a rollback takes to reach every gateway: what is counted, then measured for real."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.config import GatewayConfig
from serving.control.controller import Controller
from serving.control.metrics import exposition
from serving.control.reach import Reach
from serving.core.rollout_types import ProviderState
from serving.errors import StoreError
from serving.gateway.server import GatewayServer
from tests.control.rollout_world import QUICK, RolloutWorld
from tests.control.traffic import Traffic

LIMIT_MS = 250.0


def test_the_last_live_gateway_counts() -> None:
    reach = Reach()
    reach.decided("m:1", 10.0)
    reach.heard("a", 7, 10.01)
    reach.published("m:1", 7, {"a": 6, "b": 6}, 10.02)
    assert reach.took("m:1", {"a", "b"}) is None
    reach.heard("a", 7, 10.05)
    reach.heard("b", 6, 10.06)
    assert reach.took("m:1", {"a", "b"}) is None
    reach.heard("b", 8, 10.11)
    reach.heard("a", 8, 10.50)
    reach.heard("b", 9, 10.60)
    assert reach.took("m:1", {"a", "b"}) == pytest.approx(0.11)


def test_a_gateway_that_died_is_not_waited_for() -> None:
    reach = Reach()
    reach.decided("m:1", 10.0)
    reach.published("m:1", 7, {"a": 6, "b": 6}, 10.02)
    reach.heard("a", 7, 10.05)
    assert reach.took("m:1", {"a"}) == pytest.approx(0.05)
    assert reach.took("m:1", set()) is None, "nobody has confirmed anything"


def test_routes_that_need_no_change_are_there_at_once() -> None:
    reach = Reach()
    reach.decided("m:1", 10.0)
    reach.published("m:1", 7, {"a": 7}, 10.02)
    assert reach.took("m:1", {"a"}) == pytest.approx(0.02)


def test_a_commit_that_had_to_be_repeated_is_part_of_it() -> None:
    reach = Reach()
    reach.decided("m:1", 10.0)
    reach.decided("m:1", 12.0)
    reach.published("m:1", 7, {}, 12.0)
    reach.heard("a", 7, 12.01)
    assert reach.took("m:1", {"a"}) == pytest.approx(2.01)
    reach.keep(())
    assert reach.took("m:1", {"a"}) is None


class Direct:
    """The controller as gateways call it, on the same loop."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def call(self, method: str, *args: Any, timeout_s: float = 5.0) -> Any:
        if method == "report":
            return self._controller.report(args[0])
        assert method == "poll_routes"
        _, revision, wait_s = args
        return await self._controller.poll_routes(revision, wait_s)

    async def call_patiently(self, method: str, *args: Any, patience_s: float) -> Any:
        return await self.call(method, *args)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def let_time_pass(controller: Controller) -> None:
    """From now on clocks run by themselves."""
    clock, began = controller.clock, time.monotonic()
    monotonic, unix = clock.monotonic(), clock.unix()
    clock.monotonic = lambda: monotonic + time.monotonic() - began
    clock.unix = lambda: unix + time.monotonic() - began


@pytest.mark.parametrize("why", ["verdict", "person"])
def test_two_gateways_confirm_a_rollback_within_a_quarter_of_a_second(
    tmp_path: Path, why: str
) -> None:
    """Real gateways, store and loops; gateways would report by themselves only once an hour."""
    trigger = {"kind": "webhook", "url": "http://tests", "action": "rollback", "failures": 1}
    plan = {
        **QUICK,
        "steps": [{"weight": 20, "hold": 600}],
        "analysis": {"min_units": 8, "tick": 0.1, "triggers": {"load": trigger}},
    }
    world = RolloutWorld(tmp_path, traffic=Traffic(gateways=0))

    async def scenario() -> None:
        controller = await world.serving(rollout=plan)
        await world.change(controller, "2", rollout=plan)
        world.providers.answers["load"] = ProviderState("ok")
        await world.until(controller, "observing")
        let_time_pass(controller)
        await controller.start()
        world.announce(controller)
        gateways = [
            GatewayServer(
                GatewayConfig(port=0),
                gateway=f"g{n}",
                node="node",
                controller=Direct(controller),
                tick_s=3600.0,
            )
            for n in range(2)
        ]
        for gateway in gateways:
            await gateway.start()
        try:
            await until(lambda: _running(controller) == [controller.board.revision] * 2)
            if why == "verdict":
                world.providers.answers["load"] = ProviderState("fail", fails=1)
            else:
                await controller.command_rollout(
                    "m", "rollback", actor="alice", reason="", expected_state="observing"
                )
            await until(lambda: not controller.rollouts.records)
            shown = await controller.show_rollout("m")
        finally:
            await controller.stop()
            for gateway in gateways:
                await gateway.stop()
        assert shown["state"] == "rolled_back"
        assert 0 < shown["rollback_ms"] < LIMIT_MS
        metrics = text_string_to_metric_families(exposition(controller, "2.60").decode())
        (sample,) = (s for f in metrics for s in f.samples if s.name == "serving_rollback_seconds")
        assert sample.labels == {"model": "m", "rollout": "m:1"}
        assert sample.value == pytest.approx(shown["rollback_ms"] / 1000)
        again = await world.controller()
        assert (await again.show_rollout("m"))["rollback_ms"] == shown["rollback_ms"]
        assert again.rollouts.rollbacks == {"m": ("m:1", shown["rollback_ms"])}

    asyncio.run(scenario())


def _running(controller: Controller) -> list[int]:
    return list(controller.rollouts.observer.gateways().values())


def test_what_a_store_delays_counts_and_a_rollout_without_traffic_has_no_figure(
    tmp_path: Path,
) -> None:
    world = RolloutWorld(tmp_path)

    async def scenario() -> None:
        controller = await world.serving()
        await world.change(controller, "2")
        await world.until(controller, "preparing")
        told = {"actor": "alice", "reason": "", "expected_state": None}
        await controller.command_rollout("m", "abort", **told)
        assert (await controller.show_rollout("m"))["rollback_ms"] is None
        await controller.start_rollout("m", "2", QUICK)
        await world.until(controller, "observing")
        commit, world.store.commit = world.store.commit, _full  # type: ignore[method-assign]
        with pytest.raises(StoreError):
            await controller.command_rollout("m", "rollback", **told)
        world.monotonic += 2.0
        world.store.commit = commit  # type: ignore[method-assign]
        await controller.command_rollout("m", "rollback", **told)
        await world.until(controller, "rolled_back")
        # The simulated gateways report once a second.
        assert (await controller.show_rollout("m"))["rollback_ms"] == pytest.approx(3000.0)

    asyncio.run(scenario())


def _full(**_: object) -> None:
    raise StoreError("the disk is full")


STILL = {**QUICK, "steps": [{"weight": 20, "hold": 600}]}
DRAIN_S = 15
"""`gateway.drain_s`, unless the configuration says otherwise."""


async def told(controller: Controller, name: str) -> None:
    await controller.command_rollout("m", name, actor="alice", reason="", expected_state=None)


async def observing(world: RolloutWorld) -> Controller:
    controller = await world.serving(rollout=STILL)
    await world.change(controller, "2", rollout=STILL)
    await world.until(controller, "observing")
    await world.seconds(controller, 3)
    return controller


async def silence(world: RolloutWorld, controller: Controller, seconds: int) -> None:
    """Time passes, and no gateway reports."""
    for _ in range(seconds):
        world.monotonic += 1.0
        world.announce(controller)
        await controller.step(look=True)


async def state(controller: Controller) -> str:
    return (await controller.rollouts.find("m")).rollout.state.value


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("command", "waits", "ends"),
    [("abort", "rolling_back", "rolled_back"), ("promote", "promoting", "baking")],
)
def test_a_gateway_that_is_silent_is_waited_for(
    tmp_path: Path, command: str, waits: str, ends: str, restart: bool
) -> None:
    """It answers clients by its last table, which nobody has told it to leave."""
    world = RolloutWorld(tmp_path)

    async def scenario() -> None:
        controller = await observing(world)
        silent = world.traffic.fleet.pop()
        await told(controller, command)
        if restart:
            controller = await world.controller()
        await world.seconds(controller, DRAIN_S - 4)
        assert await state(controller) == waits
        world.traffic.fleet.append(silent)
        await world.seconds(controller, 2)
        assert await state(controller) == ends

    asyncio.run(scenario())


def test_a_gateway_that_is_silent_for_longer_than_it_may_drain_is_gone(tmp_path: Path) -> None:
    world = RolloutWorld(tmp_path)

    async def scenario() -> None:
        controller = await observing(world)
        world.traffic.fleet.pop()
        await told(controller, "abort")
        await world.until(controller, "rolled_back", at_most=DRAIN_S + 2)
        # The other one has confirmed long before.
        assert (await controller.show_rollout("m"))["rollback_ms"] == pytest.approx(1000.0)

    asyncio.run(scenario())


def test_what_no_gateway_has_confirmed_is_not_confirmed(tmp_path: Path) -> None:
    world = RolloutWorld(tmp_path)

    async def scenario() -> None:
        controller = await observing(world)
        await silence(world, controller, DRAIN_S + 1)
        await told(controller, "abort")
        await silence(world, controller, QUICK["ready_timeout"] + 1)
        rollout = (await controller.rollouts.find("m")).rollout
        assert rollout.state == "rollback_failed"
        assert rollout.reason.startswith("no gateway has said which routes it runs; ")
        await world.seconds(controller, 2)
        assert await state(controller) == "rolled_back"

    asyncio.run(scenario())
