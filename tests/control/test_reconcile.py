"""The controller's steps against a real store, with crashes at every effect."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from serving.control.controller import Controller
from serving.core.routing import RouteTable
from serving.errors import ClusterError, ConflictError, RegistryError, StoreError
from tests.control.world import Bomb, Crash, World, announcement, gateway_report, model_row

STORE_EFFECTS = ("commit", "save_counters", "fold_counters", "append_event")
CLUSTER_EFFECTS = ("start", "delete")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def routed(controller: Controller) -> dict[str, tuple[str, list[str]]]:
    """Model to (default version, versions that have an endpoint), as gateways see it."""
    return {
        name: (model.version, [v for v, arm in sorted(model.arms.items()) if arm.endpoints])
        for name, model in controller.board.table.models.items()
    }


def test_an_apply_starts_routes_and_settles(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        plan = await world.apply(controller, {"m": {"version": "@champion", "replicas": 2}})
        assert [(c["change"], c["version"]) for c in plan["changes"]] == [("start", "1")]
        await controller.step(look=True)
        assert len(world.cluster.started) == 1
        assert routed(controller) == {}
        await world.settle(controller)
        assert routed(controller) == {"m": ("1", ["1"])}
        assert len(controller.board.table.models["m"].arms["1"].endpoints) == 2
        assert controller.reconciler.settled
        assert world.store.route_table() == controller.board.table.to_dict()

    run(scenario())


def test_a_dry_run_changes_nothing(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        plan = await world.apply(controller, {"m": {"version": "2"}}, dry_run=True)
        assert plan["dry_run"]
        assert [(c["change"], c["version"]) for c in plan["changes"]] == [("start", "2")]
        await world.settle(controller)
        assert world.cluster.started == []
        assert world.store.get_pins() == []

    run(scenario())


def test_a_moved_alias_changes_nothing_until_the_next_apply(world: World) -> None:
    async def scenario() -> None:
        models = {"m": {"version": "@champion"}}
        controller = await world.controller()
        await world.apply(controller, models)
        await world.settle(controller)
        world.resolver.champion = "2"
        await world.settle(controller)
        again = await world.controller()
        await world.settle(again)
        assert routed(again) == {"m": ("1", ["1"])}
        assert world.resolver.calls == 1
        (pin,) = world.store.get_pins()
        assert (pin.ref, pin.version) == ("@champion", "1")
        await world.apply(again, models)
        await world.settle(again)
        assert routed(again) == {"m": ("2", ["2"])}

    run(scenario())


def test_the_old_application_goes_only_when_the_gateways_have_left_it(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        (old,) = world.cluster.phases
        before = controller.board.revision
        await world.apply(controller, {"m": {"version": "2"}})
        await controller.step(look=True)
        world.announce(controller)
        controller.report(gateway_report("g1", before))
        await controller.step(look=True)
        assert routed(controller) == {"m": ("2", ["2"])}
        assert old in world.cluster.phases, "the gateway still routes by the old table"
        busy = [model_row("1", 5, in_flight=1)]
        controller.report(gateway_report("g1", controller.board.revision, busy))
        await controller.step(look=True)
        assert old in world.cluster.phases, "it still waits for an answer"
        controller.report(gateway_report("g1", controller.board.revision, [model_row("1", 6)]))
        await controller.step(look=True)
        assert old not in world.cluster.phases

    run(scenario())


def test_a_gateway_that_never_answers_holds_nothing_up_for_ever(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        (old,) = world.cluster.phases
        await world.apply(controller, {"m": {"version": "2"}})
        for _ in range(30):
            world.monotonic += 1.0
            world.announce(controller)
            controller.report(gateway_report("g1", 0, [model_row("1", 5, in_flight=1)]))
            await controller.step(look=True)
        assert old in world.cluster.deleted

    run(scenario())


def test_a_version_that_fails_is_given_up_with_its_error(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        world.cluster.broken = {"2"}
        await world.apply(controller, {"m": {"version": "2"}})
        await world.settle(controller)
        assert routed(controller) == {"m": ("1", ["1"])}
        assert list(controller.state.given_up.values()) == ["the golden outputs differ"]
        assert len(world.cluster.phases) == 1, "the failed application is deleted"
        started = len(world.cluster.started)
        again = await world.controller()
        await world.settle(again)
        assert len(world.cluster.started) == started, "not tried again by itself"
        world.cluster.broken = set()
        plan = await world.apply(again, {"m": {"version": "2"}})
        assert [(c["change"], c["reason"]) for c in plan["changes"]] == [
            ("stop", "no longer asked for"),
            ("start", "failed before"),
        ]
        await world.settle(again)
        assert routed(again) == {"m": ("2", ["2"])}

    run(scenario())


def test_a_replaced_replica_enters_and_a_silent_one_leaves_the_table(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1", "replicas": 2}})
        await world.settle(controller)
        (app,) = world.cluster.apps.values()

        def names() -> list[str]:
            arm = controller.board.table.models["m"].arms["1"]
            return [e.replica.rpartition("#")[2] for e in arm.endpoints]

        assert names() == ["0", "1"]
        revision = controller.board.revision
        for second in range(10):
            world.monotonic += 1.0
            controller.announce(announcement(app, 1))
            if second >= 2:
                controller.announce(announcement(app, 7))
            await controller.step(look=False)
        assert names() == ["1", "7"]
        assert controller.board.revision == revision + 2
        controller.announce(announcement(app, 7, state="draining"))
        await controller.step(look=False)
        assert names() == ["1"]

    run(scenario())


def test_a_lost_replica_without_a_replacement_leaves_after_eight_seconds(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        world.monotonic += 7.9
        await controller.step(look=False)
        assert routed(controller) == {"m": ("1", ["1"])}
        world.monotonic += 0.2
        await controller.step(look=False)
        assert routed(controller) == {"m": ("1", [])}, "the version stays, its requests wait"

    run(scenario())


def test_a_restarted_controller_publishes_nothing_before_the_replicas_are_heard(
    world: World,
) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1", "replicas": 2}})
        await world.settle(controller)
        revision = controller.board.revision
        again = await world.controller()
        assert again.board.revision == revision
        stored = await again.poll_routes(0, 0.0)
        assert stored is not None
        assert RouteTable.from_dict(stored) == controller.board.table
        (app,) = world.cluster.apps.values()
        again.announce(announcement(app, 0))
        await again.step(look=True)
        assert again.board.revision == revision, "one of two has been heard"
        again.announce(announcement(app, 1))
        await again.step(look=True)
        assert again.board.revision == revision, "nothing has changed"
        assert routed(again) == {"m": ("1", ["1"])}

    run(scenario())


def test_a_restarted_controller_waits_six_seconds_for_a_replica_that_died(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1", "replicas": 2}})
        await world.settle(controller)
        again = await world.controller()
        (app,) = world.cluster.apps.values()
        for _ in range(6):
            world.monotonic += 1.0
            again.announce(announcement(app, 0))
            await again.step(look=True)
        assert len(again.board.table.models["m"].arms["1"].endpoints) == 2
        world.monotonic += 0.1
        await again.step(look=True)
        assert len(again.board.table.models["m"].arms["1"].endpoints) == 1

    run(scenario())


def test_another_deployment_on_the_same_store_starts_afresh(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        revision = controller.board.revision
        second = World(world.home, deployment="second")
        fresh = await second.controller()
        assert fresh.board.table == RouteTable(revision + 1, complete=False)
        assert fresh.state.desired.models == {}
        await second.apply(fresh, {"m": {"version": "1"}})
        await second.settle(fresh)
        assert routed(fresh) == {"m": ("1", ["1"])}
        assert fresh.board.revision > revision + 1, "revisions only grow"

    run(scenario())


def test_no_models_is_a_table_too(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.step(look=True)
        assert controller.board.revision == 0
        await world.apply(controller, {})
        await controller.step(look=True)
        assert controller.board.revision == 1
        assert controller.board.table.models == {}

    run(scenario())


def test_applies_are_serialised_and_the_second_sees_the_first(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        first, second = await asyncio.gather(
            world.apply(controller, {"m": {"version": "1"}}),
            world.apply(controller, {"m": {"version": "2"}}),
        )
        assert (first["apply"], second["apply"]) == (1, 2)
        assert [(c["change"], c["version"]) for c in second["changes"]] == [
            ("stop", "1"),
            ("start", "2"),
        ]
        await world.settle(controller)
        assert routed(controller) == {"m": ("2", ["2"])}

    run(scenario())


def test_an_apply_that_cannot_be_resolved_changes_nothing(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        with pytest.raises(RegistryError, match="no version 9"):
            await world.apply(controller, {"m": {"version": "9"}})
        await world.settle(controller)
        assert routed(controller) == {"m": ("1", ["1"])}
        assert controller.state.apply_id == 1

    run(scenario())


def test_a_version_whose_files_were_replaced_is_refused(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        world.resolver.digests["1"] = "sha256:" + "f" * 64
        with pytest.raises(RegistryError, match="it was replaced"):
            await world.apply(controller, {"m": {"version": "1"}})

    run(scenario())


def test_only_models_can_change_while_it_runs(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        raw = world.config({"m": {"version": "1"}}).model_dump(mode="json")
        raw["gateway"]["port"] = 9999
        with pytest.raises(ConflictError, match=r"gateway is .* \{'port': 9999\}"):
            await controller.apply(raw, dry_run=False)
        raw["gateway"]["port"] = 0
        await controller.apply(raw, dry_run=False)

    run(scenario())


def test_a_store_that_refuses_delays_and_loses_nothing(world: World) -> None:
    async def scenario() -> None:
        refuse = False

        def trip() -> str:
            if refuse:
                raise StoreError("the disk is full")
            return ""

        controller = await world.controller(
            lambda target, what: Bomb(target, STORE_EFFECTS, trip) if what == "store" else target
        )
        await world.apply(controller, {"m": {"version": "1"}})
        await controller.step(look=True)
        world.announce(controller)
        refuse = True
        with pytest.raises(StoreError, match="full"):
            await controller.step(look=True)
        assert controller.board.revision == 0, "what is not saved is not published"
        refuse = False
        await world.settle(controller)
        assert routed(controller) == {"m": ("1", ["1"])}

    run(scenario())


def test_replacements_are_published_while_serve_does_not_answer(world: World) -> None:
    async def scenario() -> None:
        down = False

        class Sick:
            def __getattr__(self, name: str) -> Any:
                if down:
                    raise ClusterError("Ray Serve does not answer")
                return getattr(world.cluster, name)

        controller = await world.controller(
            lambda target, what: Sick() if what == "cluster" else target
        )
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        down = True
        (app,) = world.cluster.apps.values()
        controller.announce(announcement(app, 5))
        with pytest.raises(ClusterError):
            await controller.step(look=True)
        endpoints = controller.board.table.models["m"].arms["1"].endpoints
        assert f"{app.name}#5" in [e.replica for e in endpoints]

    run(scenario())


def test_counters_survive_the_controller(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        controller.report(gateway_report("g1", 1, [model_row("1", 100)]))
        controller.report(gateway_report("g2", 1, [model_row("1", 11)]))
        await controller.step(look=True)
        again = await world.controller()
        assert again.totals.sum()["m", "1"].total == 111
        again.report(gateway_report("g1", 1, [model_row("1", 150)]))
        assert again.totals.sum()["m", "1"].total == 161

    run(scenario())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_effect_is_recovered_from(tmp_path: Path, when: str) -> None:
    """Count the effects of a rollout, then crash at each of them and start a new controller."""

    async def rollout(world: World, fuse: int) -> int:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        (old,) = world.cluster.phases
        effects = 0

        def trip() -> str:
            nonlocal effects
            effects += 1
            return when if effects == fuse else ""

        def wrap(target: Any, what: str) -> Any:
            return Bomb(target, STORE_EFFECTS if what == "store" else CLUSTER_EFFECTS, trip)

        async def step(controller: Controller) -> None:
            world.monotonic += 1.0
            world.announce(controller)
            controller.report(world.report(controller.board.revision, models=[model_row("1", 7)]))
            await controller.step(look=True)
            for arm in controller.board.table.models["m"].arms.values():
                for endpoint in arm.endpoints:
                    app = endpoint.replica.rpartition("#")[0]
                    assert app in world.cluster.phases, "deleted while the table routes to it"

        controller = await world.controller(wrap)
        world.announce(controller)
        applied = False
        try:
            await world.apply(controller, {"m": {"version": "2", "replicas": 2}})
            applied = True
            for _ in range(12):
                await step(controller)
        except Crash:
            controller = await world.controller()
            if not applied and controller.state.apply_id == 1:
                await world.apply(controller, {"m": {"version": "2", "replicas": 2}})
            for _ in range(20):
                await step(controller)
        assert routed(controller) == {"m": ("2", ["2"])}
        assert len(controller.board.table.models["m"].arms["2"].endpoints) == 2
        assert old not in world.cluster.phases
        assert len(world.cluster.phases) == 1
        assert controller.totals.sum()["m", "1"].total == 7
        world.store.close()
        return effects

    def fresh(name: str) -> World:
        home = tmp_path / name
        home.mkdir()
        return World(home)

    effects = asyncio.run(rollout(fresh("clean"), 0))
    assert effects >= 7, "a rollout has more effects than this: the test has come loose"
    for fuse in range(1, effects + 1):
        asyncio.run(rollout(fresh(f"crash-{fuse}"), fuse))
