"""Commits of which nobody knows whether they were done: what counts is what the store has."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.errors import ConflictError, StoreError
from tests.control.rollout_world import QUICK, RolloutWorld, default, replayed, standing, weight
from tests.control.traffic import Version

SLOW = {**QUICK, "steps": [{"weight": 20, "hold": 60}]}
LOST = "the connection was lost during COMMIT"


@pytest.fixture
def world(tmp_path: Path) -> RolloutWorld:
    return RolloutWorld(tmp_path)


def lose(world: RolloutWorld, which: Callable[[int], bool]) -> list[int]:
    """Commits are done, but the n-th for which `which` says so ends in an error; those that did."""
    commit = world.store.commit
    seen, lost = 0, []

    def wrapped(**options: Any) -> None:
        nonlocal seen
        commit(**options)
        seen += 1
        if which(seen):
            lost.append(seen)
            raise StoreError(LOST)

    world.store.commit = wrapped  # type: ignore[method-assign]
    return lost


async def tell(controller: Controller, name: str) -> Any:
    return await controller.command_rollout(
        "m", name, actor="alice", reason="I say so", expected_state=None
    )


async def observing(world: RolloutWorld) -> Controller:
    controller = await world.serving(rollout=SLOW)
    await world.change(controller, "2", rollout=SLOW)
    await world.until(controller, "observing")
    return controller


def agree(world: RolloutWorld, controller: Controller) -> None:
    """Memory, the rollouts' rows, the audit log, and the published and the saved table."""
    assert replayed(world.store) == standing(world.store)
    for record in controller.rollouts.records:
        row = world.store.rollout(record.rollout.id)
        assert row is not None
        assert row.state == record.rollout.state
    assert world.store.desired() == controller.state.to_dict()
    assert world.store.route_table() == controller.board.table.to_dict()


def test_a_start_that_was_committed_is_known_to_whoever_tries_again(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        lose(world, lambda n: n == 1)
        with pytest.raises(StoreError, match=LOST):
            await controller.start_rollout("m", "2", SLOW)
        with pytest.raises(ConflictError, match="rollout m:1 of model 'm' to version 2 is pending"):
            await controller.start_rollout("m", "2", SLOW)
        await tell(controller, "abort")
        agree(world, controller)
        again = await world.controller()
        assert again.rollouts.of("m") == []

    asyncio.run(scenario())


def test_an_abort_that_was_committed_is_published_and_told(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await observing(world)
        assert weight(controller) == 0.2
        lose(world, lambda n: n == 1)
        with pytest.raises(StoreError, match=LOST):
            await tell(controller, "abort")
        await world.second(controller)
        assert weight(controller) == 0.0
        agree(world, controller)
        await world.until(controller, "rolled_back")
        told = [n.rollout.state for n in world.providers.notices if n.subject == "transition"]
        assert told[-3:] == ["rolling_back", "rolled_back", "rolled_back"]
        shown = await controller.show_rollout("m")
        assert shown["rollback_ms"] == pytest.approx(2000.0)

    asyncio.run(scenario())


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("failing", [0.0, 0.6])
def test_a_rollout_comes_to_its_end_whichever_commits_are_lost(
    world: RolloutWorld, every: int, failing: float
) -> None:
    async def scenario() -> None:
        world.traffic.versions["2"] = Version(failing=failing)
        controller = await world.serving()
        await world.change(controller, "2")
        lost = lose(world, lambda n: n % every == 0)
        for _ in range(60):
            with contextlib.suppress(StoreError):
                await world.second(controller)
        assert len(lost) >= 3
        world.store.commit = type(world.store).commit.__get__(world.store)  # type: ignore[method-assign]
        await world.seconds(controller, 2)
        agree(world, controller)
        record = await controller.rollouts.find("m")
        assert record.rollout.state == ("rolled_back" if failing else "succeeded")
        assert default(controller) == ("1" if failing else "2")
        assert world.traffic.failures_seen_by_clients == 0

    asyncio.run(scenario())


def test_a_command_whose_operator_hung_up_is_carried_out(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await observing(world)
        commit, began, go_on = world.store.commit, threading.Event(), threading.Event()

        def slow(**options: Any) -> None:
            began.set()
            assert go_on.wait(20)
            commit(**options)

        world.store.commit = slow  # type: ignore[method-assign]
        told = asyncio.create_task(tell(controller, "abort"))
        assert await asyncio.to_thread(began.wait, 20)
        told.cancel()
        with pytest.raises(asyncio.CancelledError):
            await told
        go_on.set()
        await world.second(controller)
        assert weight(controller) == 0.0
        agree(world, controller)

    asyncio.run(scenario())


def test_a_verdict_whose_commit_failed_does_not_wait_for_the_next_interval(
    world: RolloutWorld,
) -> None:
    async def scenario() -> None:
        plan = {**SLOW, "analysis": {"min_units": 8, "tick": "30s"}}
        controller = await world.serving(rollout=plan)
        await world.change(controller, "2", rollout=plan)
        await world.until(controller, "observing", at_most=200)
        world.traffic.versions["2"] = Version(failing=0.9)
        commit, failed_at = world.store.commit, []

        def locked_once(**options: Any) -> None:
            taken_back = any(r.state == "rolling_back" for r in options["rollouts"])
            if taken_back and not failed_at:
                failed_at.append(world.monotonic)
                raise StoreError("it is locked by another process")
            commit(**options)

        world.store.commit = locked_once  # type: ignore[method-assign]
        for _ in range(60):
            if failed_at:
                break
            with contextlib.suppress(StoreError):
                await world.second(controller)
        await world.until(controller, "rolling_back", at_most=2)

    asyncio.run(scenario())
