"""Versions that were taken back and are held, and what ends that."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.errors import ConflictError, NotFound
from tests.control.rollout_world import RolloutWorld, default, replayed, standing


@pytest.fixture
def world(tmp_path: Path) -> RolloutWorld:
    return RolloutWorld(tmp_path)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


async def held(world: RolloutWorld) -> Controller:
    """Version 1 answers; version 2 was rolled back by hand, and is held."""
    controller = await world.serving()
    await world.rolled_out(controller, "2")
    await rollback(controller)
    await world.until(controller, "rolled_back")
    return controller


async def anew(world: RolloutWorld, deployment: str = "second") -> Controller:
    """The controller of another deployment on the same store, where nothing runs yet."""
    world.deployment, world.cluster.phases = deployment, {}
    return await world.controller()


def changes(plan: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["change"], row["version"]) for row in plan["changes"]]


@pytest.mark.parametrize("ended", [True, False])
def test_a_switch_to_a_held_version_ends_the_hold_for_good(
    world: RolloutWorld, ended: bool
) -> None:
    async def scenario() -> None:
        if ended:
            controller = await held(world)
        else:
            # Its rollback has begun, and has not come to its end.
            controller = await world.observing()
            await controller.command_rollout(
                "m", "abort", actor="ann", reason="odd", expected_state=None
            )
        await world.change(controller, "2", rollout="immediate")
        await world.seconds(controller, 4)
        assert default(controller) == "2"
        assert changes(await world.change(controller, "2"))[-1] == ("unchanged", "2")
        again = await anew(world)
        assert changes(await world.change(again, "2")) == [("start", "2")]
        await world.seconds(again, 4)
        assert default(again) == "2"
        assert replayed(world.store) == standing(world.store)

    run(scenario())


def test_an_immediate_start_of_a_held_version_ends_the_hold(world: RolloutWorld) -> None:
    async def scenario() -> None:
        await held(world)
        again = await anew(world)
        await world.change(again, "2", rollout="immediate")
        await world.seconds(again, 4)
        third = await anew(world, "third")
        assert changes(await world.change(third, "2")) == [("start", "2")]

    run(scenario())


def test_a_dry_run_ends_no_hold(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await held(world)
        asked = {"m": {"version": "2", "rollout": "immediate"}}
        await world.apply(controller, asked, dry_run=True)
        assert changes(await world.change(controller, "2"))[-1] == ("held", "2")

    run(scenario())


def test_a_held_version_stays_held_while_the_stable_one_loads(world: RolloutWorld) -> None:
    async def scenario() -> None:
        await held(world)
        again = await anew(world)
        for change in ("start", "unchanged"):
            assert changes(await world.change(again, "2")) == [(change, "1"), ("held", "2")]
        await world.seconds(again, 4)
        assert default(again) == "1"

    run(scenario())


def test_an_apply_leaves_in_the_audit_log_what_it_changed(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await held(world)
        await world.change(controller, "2", rollout="immediate")
        await world.seconds(controller, 4)
        await world.change(controller, "2")
        first, *_, switched, same = world.store.audit(subject="configuration")
        assert first.body["switched"] == {"m": {"from": None, "to": "1"}}
        assert switched.body["switched"] == {"m": {"from": "1", "to": "2"}}
        assert changes(switched.body) == [("stop", "1"), ("start", "2")]
        assert same.body["switched"] == {}

    run(scenario())


async def rollback(controller: Controller) -> Any:
    return await controller.command_rollout(
        "m", "rollback", actor="ann", reason="odd", expected_state=None
    )


def test_a_rollback_after_a_switch_says_what_to_do(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await held(world)
        with pytest.raises(ConflictError, match=r"nothing to go back from: version 1 answers"):
            await rollback(controller)
        await world.change(controller, "2", rollout="immediate")
        await world.seconds(controller, 4)
        await world.change(controller, "2")
        with pytest.raises(ConflictError) as refused:
            await rollback(controller)
        assert str(refused.value) == (
            "nothing of model 'm' is kept to go back to since apply 3 switched it from version 1 "
            'to 2 at once; to go back, apply a file with version: "1" and rollout: immediate, or '
            "with evidence: serving rollout start m --to 1"
        )
        await world.change(controller, "3", rollout="immediate")
        with pytest.raises(ConflictError, match=r"apply 5 switched it from version 2 to 3 at once"):
            await rollback(controller)

    run(scenario())


def test_a_rollback_where_no_rollout_has_been_says_what_to_do(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        with pytest.raises(NotFound, match="served, by version 1, and has had no rollout yet"):
            await rollback(controller)
        await world.change(controller, "2", rollout="immediate")
        with pytest.raises(ConflictError, match=r'apply 2 switched .* with version: "1"'):
            await rollback(controller)

    run(scenario())


def test_an_apply_says_what_is_kept_for_a_rollback(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        await world.rolled_out(controller, "2")
        plan = await world.change(controller, "2")
        assert changes(plan) == [("unchanged", "1"), ("unchanged", "2")]
        assert plan["changes"][0]["reason"] == "kept for another 8 s for a rollback"
        await world.seconds(controller, 2)
        assert (await rollback(controller))["state"] == "rolling_back"

    run(scenario())


@pytest.mark.parametrize("kept_no_longer", [{"rollout": "immediate"}, {}])
def test_an_apply_says_what_it_keeps_no_longer(
    world: RolloutWorld, kept_no_longer: dict[str, Any]
) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        await world.rolled_out(controller, "2")
        plan = await world.change(controller, "3", **kept_no_longer)
        assert changes(plan)[0] == ("stop", "1")

    run(scenario())
