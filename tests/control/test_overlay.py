"""What a route table says of a rollout to gateways."""

from __future__ import annotations

from asyncio import run
from pathlib import Path

import pytest

from serving.core.rollout_counts import LATENCY_BOUNDS
from tests.control.rollout_world import RolloutWorld


@pytest.fixture
def world(tmp_path: Path) -> RolloutWorld:
    return RolloutWorld(tmp_path)


def test_a_split_says_how_slow_is_slow_in_its_epoch(world: RolloutWorld) -> None:
    """By the bound that latency is judged by: of the tail in steps, its own in the bake."""

    async def scenario() -> None:
        world.traffic.requests_s = 400
        controller = await world.serving()
        await world.change(controller, "2")
        seen = set()
        state = ""
        while state not in ("succeeded", "rolled_back"):
            await world.second(controller)
            rollout = (await controller.rollouts.find("m")).rollout
            state, epoch = rollout.state, rollout.current
            split = controller.board.table.models["m"].split
            if split is None:
                continue
            assert split.epoch == epoch.epoch
            which = 2 if epoch.step == len(rollout.spec.steps) else 0
            bounds = epoch.latency_bounds
            assert split.latency_bound_s == (bounds and LATENCY_BOUNDS[bounds[which]])
            seen.add((bounds is not None, which))
        assert state == "succeeded"
        assert seen == {(False, 0), (True, 0), (True, 2)}

    run(scenario())
