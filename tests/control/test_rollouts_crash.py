"""A seeded simulation: the controller ends at any effect, another one takes over, nothing is lost.

Controller, store and the decisions are real; replicas, gateways, clients and time are simulated.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from serving.control.controller import Controller
from tests.control.rollout_world import (
    QUICK,
    RolloutWorld,
    check,
    default,
    replayed,
    standing,
    weight,
)
from tests.control.traffic import Traffic, Version
from tests.control.world import Bomb, Crash

EFFECTS = {
    "store": ("commit", "save_counters", "fold_counters", "append_event"),
    "cluster": ("start", "delete"),
    "board": ("publish",),
    "providers": ("emit",),
}
PLAN = {**QUICK, "steps": [{"weight": 20, "hold": 8}, {"weight": 50, "hold": 3}]}
SECONDS = 40
STORIES = {
    "healthy": Version(),
    "failing": Version(failing=0.6),
    "slow": Version(latency_s=0.05),
}
ENDS = {
    "healthy": ("succeeded", "2", ["2"]),
    "failing": ("rolled_back", "1", ["1"]),
    "slow": ("rolled_back", "1", ["1"]),
}


@dataclass
class Fuse:
    """Ends a controller `when` ("before" or "after") its effect `at`; `effects` counts them all.

    With `again`, every controller that follows has the same fuse. Nobody takes over for `away_s`.
    """

    at: int
    when: str = "after"
    again: bool = False
    away_s: float = 0.0
    effects: int = 0
    armed: bool = False
    blown: int = 0

    def trip(self) -> str:
        if not self.armed:
            return ""
        self.effects += 1
        if self.effects != self.at or (self.blown and not self.again):
            return ""
        self.blown += 1
        if self.again:
            self.effects = 0
        return self.when

    def wrap(self, target: Any, what: str) -> Any:
        # A log line is written anew by each that tries: nobody would get beyond it.
        names = [n for n in EFFECTS[what] if not (self.again and n == "append_event")]
        return Bomb(target, names, self.trip)


@dataclass
class End:
    """What a simulation came to."""

    controller: Controller
    world: RolloutWorld
    moves: list[tuple[str, int, float]]
    weights: list[float]


async def simulate(home: Path, story: str, fuse: Fuse) -> End:
    """A rollout to version 2 under traffic; whoever takes over goes on where the last one ended."""
    world = RolloutWorld(home, traffic=Traffic(seed=7, requests_s=80))
    _without_disk(world)
    world.traffic.versions["2"] = STORIES[story]
    await world.serving()
    controller = await world.controller(fuse.wrap)
    world.announce(controller)
    weights = [weight(controller)]

    async def survive(work: Callable[[Controller], Any]) -> None:
        nonlocal controller
        for _ in range(60):
            fuse.armed = True
            try:
                await work(controller)
                return
            except Crash:
                fuse.armed = False
                world.monotonic += fuse.away_s
                controller = await world.controller(fuse.wrap)
                world.announce(controller)
                for gateway in world.traffic.fleet:
                    gateway.table = controller.board.table
                    controller.report(gateway.report())
        raise AssertionError("no controller gets through")

    async def apply(controller: Controller) -> None:
        if controller.state.apply_id == 1:
            await world.change(controller, "2", rollout=PLAN)

    async def step(controller: Controller) -> None:
        await controller.step(look=True)
        check(controller)
        if weight(controller) != weights[-1]:
            weights.append(weight(controller))

    await survive(apply)
    for _ in range(SECONDS):
        world.monotonic += 1.0
        world.announce(controller)
        world.traffic.second(controller)
        await survive(step)
    fuse.armed = False
    moves = [
        (a.body["to"], a.body["step"], a.body["weight"])
        for a in world.store.audit(after=0, limit=1000)
        if a.subject == "m:1" and a.body["from"] != a.body["to"]
    ]
    return End(controller, world, moves, weights)


def _without_disk(world: RolloutWorld) -> None:
    """Processes end here, not machines: what is written need not reach the disk."""

    @event.listens_for(world.store._engine, "connect")
    def fast(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    world.store._engine.dispose()


def assert_as_without_a_crash(end: End, clean: End, story: str) -> None:
    state, version, running = ENDS[story]
    rollouts = standing(end.world.store)
    assert (rollouts["m:1"]["to"], default(end.controller)) == (state, version)
    found = end.world.cluster
    assert sorted(found.apps[name].replica.version for name in found.phases) == running
    assert end.moves == clean.moves
    assert end.weights == clean.weights
    assert replayed(end.world.store) == rollouts
    assert end.world.traffic.failures_seen_by_clients == 0
    counted = end.controller.totals.sum()["m", "1"].total
    assert counted == sum(g.answered["1"] for g in end.world.traffic.fleet)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[End, int]]:
    """Each story without a crash, and how many effects it has."""
    found = {}
    for story in STORIES:
        fuse = Fuse(at=0)
        home = tmp_path_factory.mktemp(story)
        found[story] = (asyncio.run(simulate(home, story, fuse)), fuse.effects)
    return found


@pytest.mark.parametrize("story", STORIES)
def test_without_a_crash(clean: dict[str, tuple[End, int]], story: str) -> None:
    end, effects = clean[story]
    assert_as_without_a_crash(end, end, story)
    assert effects > 40, "a rollout has more effects than this: the test has come loose"
    kinds = [to for to, _, _ in end.moves]
    assert kinds[:4] == ["pending", "preparing", "shadowing", "observing"]


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize(("when", "at"), [("after", 1), ("before", 2), ("after", 3)])
def test_every_controller_ends_at_once(
    clean: dict[str, tuple[End, int]], tmp_path: Path, story: str, when: str, at: int
) -> None:
    """Each one gets an effect or two further, so that every effect is somebody's last."""
    fuse = Fuse(at, when, again=True)
    end = asyncio.run(simulate(tmp_path, story, fuse))
    assert fuse.blown > 15
    assert_as_without_a_crash(end, clean[story][0], story)


@pytest.mark.parametrize("seed", range(6))
def test_one_crash_somewhere(clean: dict[str, tuple[End, int]], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    story = rng.choice(list(STORIES))
    at, when = rng.randint(1, clean[story][1]), rng.choice(("before", "after"))
    fuse = Fuse(at, when, away_s=rng.choice((0.0, 600.0)))
    end = asyncio.run(simulate(tmp_path, story, fuse))
    assert fuse.blown == 1
    assert_as_without_a_crash(end, clean[story][0], story)
