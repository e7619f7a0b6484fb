"""Rollouts through the controller: a real store, simulated replicas, gateways and clients."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.control.totals import MAX_INSTANCES
from serving.core.rollout_counts import recent
from serving.core.rollout_types import ProviderState, Rollout
from serving.core.types import Signature, TensorSpec
from serving.errors import ConfigError, ConflictError, NotFound, RegistryError, StoreError
from tests.control.rollout_world import QUICK, RolloutWorld, default, replayed, standing, weight
from tests.control.traffic import Version
from tests.control.world import SIGNATURE, gateway_report


@pytest.fixture
def world(tmp_path: Path) -> RolloutWorld:
    return RolloutWorld(tmp_path)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def versions_running(world: RolloutWorld) -> list[str]:
    return sorted(world.cluster.apps[name].replica.version for name in world.cluster.phases)


async def tell(controller: Any, name: str, key: str = "m", state: str | None = None) -> Any:
    return await controller.command_rollout(
        key, name, actor="alice", reason="I say so", expected_state=state
    )


def test_a_healthy_version_is_promoted_step_by_step(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        plan = await world.change(controller, "2")
        assert [(c["change"], c["version"]) for c in plan["changes"]] == [
            ("unchanged", "1"),
            ("rollout", "2"),
        ]
        assert plan["changes"][1]["reason"] == "rollout from version 1 by plan fast"
        assert plan["rollouts"] == [{"model": "m", "id": "m:1"}]
        weights: list[float] = []
        world.look = lambda c: weights.append(weight(c))
        record = await world.until(controller, "succeeded")
        steps = list(dict.fromkeys(weights))
        assert steps == [0.0, 0.2, 0.5, 1.0]
        assert default(controller) == "2"
        assert controller.board.table.models["m"].split is None
        assert versions_running(world) == ["1", "2"], "the old version is kept warm"
        await world.seconds(controller, 12)
        assert versions_running(world) == ["2"]
        assert (await controller.rollouts.find("m")).rollout.warm_until is None
        assert record.rollout.stable_digest != record.rollout.canary_digest
        assert world.traffic.failures_seen_by_clients == 0
        assert replayed(world.store) == standing(world.store)

    run(scenario())


def test_a_failing_version_is_taken_back_and_no_client_notices(world: RolloutWorld) -> None:
    async def scenario() -> None:
        world.traffic.versions["2"] = Version(failing=0.6)
        controller = await world.serving()
        await world.change(controller, "2")
        record = await world.until(controller, "rolled_back")
        assert record.rollout.reason.startswith("errors: canary failed")
        assert "errors" in [v.trigger for v in record.rollout.verdicts if v.verdict == "fail"]
        await world.seconds(controller, 3)
        assert (default(controller), weight(controller)) == ("1", 0.0)
        assert versions_running(world) == ["1"]
        assert world.traffic.failures_seen_by_clients == 0
        assert record.arms["canary"]["failed"] > 0
        told = [(n.event, n.rollout.state.value) for n in world.providers.notices]
        assert ("post-rollout", "rolled_back") in told
        assert replayed(world.store) == standing(world.store)

    run(scenario())


def test_a_rollout_that_cannot_be_decided_stays_as_it_is(
    world: RolloutWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the controller goes on."""

    def broken(*_: object) -> Rollout:
        raise ZeroDivisionError("division by zero")

    async def scenario() -> None:
        controller = await world.observing()
        with monkeypatch.context() as patch:
            patch.setattr("serving.control.rollout_decisions.decide", broken)
            await world.seconds(controller, 3)
        assert "rollout m:1 cannot be decided; it stays as it is" in caplog.text
        assert (await controller.rollouts.find("m")).rollout.state.value == "observing"
        await world.until(controller, "succeeded")

    run(scenario())


def test_what_cannot_be_saved_keeps_no_rollout_from_being_judged(
    world: RolloutWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full() -> None:
        raise StoreError("ledger: the disk quota is used up")

    async def scenario() -> None:
        world.traffic.versions["2"] = Version(failing=0.9)
        controller = await world.serving()
        await world.change(controller, "2")
        monkeypatch.setattr(controller.ledger, "flush", full)
        await world.until(controller, "rolled_back")
        assert controller.problems.last == "ledger: the disk quota is used up"
        monkeypatch.undo()
        await world.second(controller)
        assert controller.problems.last == ""

    run(scenario())


def test_what_was_taken_back_is_not_tried_again_by_an_apply(world: RolloutWorld) -> None:
    async def scenario() -> None:
        world.traffic.versions["2"] = Version(failing=0.6)
        controller = await world.serving()
        await world.change(controller, "2")
        await world.until(controller, "rolled_back")
        plan = await world.change(controller, "2")
        held = plan["changes"][-1]
        assert (held["change"], held["version"], plan["rollouts"]) == ("held", "2", [])
        assert "serving rollout start m --to 2" in held["reason"]
        await world.seconds(controller, 3)
        assert versions_running(world) == ["1"]
        world.traffic.versions["2"] = Version()
        started = await controller.start_rollout("m", "2", QUICK, actor="bob", reason="fixed")
        assert (started["id"], started["state"], started["stable"]) == ("m:2", "pending", "1")
        await world.until(controller, "succeeded")
        assert default(controller) == "2"
        assert (await world.change(controller, "2"))["rollouts"] == []

    run(scenario())


def test_a_rollback_after_success_is_one_revision(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        await world.rolled_out(controller, "2")
        before = controller.board.revision
        await tell(controller, "rollback")
        table = controller.board.table
        assert (table.revision, table.models["m"].version) == (before + 1, "1")
        assert table.models["m"].arms["1"].endpoints
        await world.until(controller, "rolled_back")
        await world.seconds(controller, 3)
        assert versions_running(world) == ["1"]
        assert (await world.change(controller, "2"))["changes"][-1]["change"] == "held"

    run(scenario())


def test_a_rollback_too_late_says_what_to_do(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        await world.rolled_out(controller, "2")
        await world.seconds(controller, 12)
        with pytest.raises(ConflictError, match=r"no longer kept; to go .* start m --to 1"):
            await tell(controller, "rollback")
        with pytest.raises(NotFound, match="no rollout 'nobody'"):
            await tell(controller, "rollback", key="nobody")

    run(scenario())


# People.


def test_commands_are_obeyed_and_audited(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        paused = await tell(controller, "pause", key="m:1")
        assert (paused["state"], paused["actor"]) == ("paused", "alice")
        await world.seconds(controller, 8)
        assert weight(controller) == 0.2, "a pause keeps the weight"
        await tell(controller, "resume")
        await tell(controller, "promote")
        await world.until(controller, "baking")
        await tell(controller, "abort")
        assert weight(controller) == 0.0, "published before the answer"
        await world.until(controller, "rolled_back")
        by_alice = [(a.action, a.body["reason"]) for a in world.store.audit() if a.actor == "alice"]
        commands = ["pause", "resume", "promote", "abort"]
        assert by_alice == [(name, "I say so") for name in commands]

    run(scenario())


def test_an_epoch_that_no_transition_began_is_audited_with_its_own_reason(
    world: RolloutWorld,
) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        long = {"steps": [{"weight": 20, "hold": 30}], "bake": {"duration": 600}}
        await world.change(controller, "2", rollout={**QUICK, **long})
        await world.until(controller, "observing")
        await world.seconds(controller, 10)
        world.cluster.silent.add("2")
        await world.seconds(controller, 12)
        world.cluster.silent.discard("2")
        await world.until(controller, "baking")
        await world.seconds(controller, 310)
        found = [
            (a.body["weight"], a.body["reason"]) for a in world.store.audit() if a.action == "epoch"
        ]
        assert found == [
            (0.2, "latency bounds were set from what version 1 answered"),
            (0.0, "version 2 has no ready replica"),
            (0.2, "version 2 has a ready replica again"),
            (1.0, "part 2 of the bake begins"),
        ]

    run(scenario())


def test_of_two_operators_the_second_is_told_what_the_first_did(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        results = await asyncio.gather(
            tell(controller, "promote", state="observing"),
            tell(controller, "abort", state="observing"),
            return_exceptions=True,
        )
        assert results[0]["state"] == "promoting"
        assert isinstance(results[1], ConflictError)
        assert "is promoting now, not observing (alice: I say so)" in str(results[1])
        with pytest.raises(ConflictError, match="approve"):
            await tell(controller, "approve")
        with pytest.raises(NotFound, match="no command 'superseded'"):
            await tell(controller, "superseded")
        entries = len(world.store.audit())
        assert [a.action for a in world.store.audit()][-1] == "promote"
        await tell(controller, "abort", state="promoting")
        assert len(world.store.audit()) == entries + 1

    run(scenario())


def test_a_rollout_is_not_started_over_another(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        with pytest.raises(ConflictError, match="answers with version 1 already"):
            await controller.start_rollout("m", "1", None)
        with pytest.raises(NotFound, match="'other' is not served; served: m"):
            await controller.start_rollout("other", "2", None)
        with pytest.raises(ConfigError, match="no plan; allowed: canary"):
            await controller.start_rollout("m", "2", "canaries")
        await controller.start_rollout("m", "2", None)
        with pytest.raises(ConflictError, match=r"m:1 of model 'm' to version 2 is .*; abort it"):
            await controller.start_rollout("m", "3", None)
        assert len(controller.rollouts.records) == 1

    run(scenario())


# Applies while a rollout runs.


def test_the_same_target_again_changes_nothing(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        await world.change(controller, "2")
        before = await world.until(controller, "observing")
        plan = await world.change(controller, "2")
        assert [(c["change"], c["version"]) for c in plan["changes"]] == [
            ("unchanged", "1"),
            ("unchanged", "2"),
        ]
        assert plan["changes"][1]["reason"] == "rollout m:1 is observing"
        assert controller.rollouts.records == (before,)
        await world.until(controller, "succeeded")
        assert len(world.store.rollouts()) == 1

    run(scenario())


def test_an_apply_of_another_plan_says_that_the_running_one_keeps_its_own(
    world: RolloutWorld,
) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        other = {**QUICK, "steps": [{"weight": 10, "hold": 3}]}
        plan = await world.change(controller, "2", rollout=other, replicas=2)
        (row,) = (c for c in plan["changes"] if c["version"] == "2")
        assert row["reason"].endswith(
            "; rollout m:1 keeps the plan that it began with; to change it: "
            "serving rollout abort m, then serving rollout start m --to 2"
        )
        record = await controller.rollouts.find("m:1")
        assert [step.weight for step in record.rollout.spec.steps] == [20, 50]
        await tell(controller, "abort")
        await world.until(controller, "rolled_back")
        await controller.start_rollout("m", "2", None)
        record = await controller.rollouts.find("m:2")
        assert [step.weight for step in record.rollout.spec.steps] == [10]
        plan = await world.change(controller, "2", rollout=other, replicas=2)
        assert "keeps the plan" not in plan["changes"][-1]["reason"]

    run(scenario())


def test_another_target_takes_the_running_one_back_first(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        plan = await world.change(controller, "3")
        assert [(c["change"], c["version"]) for c in plan["changes"]] == [
            ("unchanged", "1"),
            ("stop", "2"),
            ("rollout", "3"),
        ]
        assert plan["changes"][1]["reason"] == "rollout m:1 is superseded by version 3"
        assert weight(controller) == 0.0
        first, second = controller.rollouts.records
        assert (first.rollout.state, second.rollout.state) == ("rolling_back", "pending")
        await world.until(controller, "succeeded", key="m:2")
        assert default(controller) == "3"
        assert world.store.rollout("m:1").state == "rolled_back"
        plan = await world.change(controller, "2")
        assert plan["changes"][-1]["change"] != "held", "nothing spoke against version 2"

    run(scenario())


def test_applying_the_stable_version_takes_the_new_one_back(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        plan = await world.change(controller, "1")
        assert plan["rollouts"] == []
        await world.until(controller, "rolled_back")
        await world.seconds(controller, 3)
        assert versions_running(world) == ["1"]
        plan = await world.change(controller, "2")
        assert plan["changes"][-1]["change"] == "rollout", "it was the file that took it back"
        await world.until(controller, "succeeded")

    run(scenario())


@pytest.mark.parametrize("target", ["2", "3"])
def test_immediate_ends_a_running_rollout(world: RolloutWorld, target: str) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        await world.change(controller, target, rollout="immediate")
        await world.until(controller, "rolled_back", key="m:1")
        await world.seconds(controller, 6)
        assert default(controller) == target
        assert versions_running(world) == [target]
        assert world.traffic.failures_seen_by_clients == 0

    run(scenario())


def test_a_model_that_is_removed_takes_its_rollout_along(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        await world.apply(controller, {})
        await world.until(controller, "rolled_back", key="m:1")
        await world.seconds(controller, 3)
        assert world.cluster.phases == {}
        assert await controller.readings.list_rollouts(model="m", active=True, limit=9) == []
        with pytest.raises(NotFound, match="'x' is not served, and had no rollout; served: none"):
            await controller.readings.list_rollouts(model="x", active=None, limit=9)

    run(scenario())


def test_settings_of_the_file_reach_the_version_on_its_way(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        await world.change(controller, "2", replicas=2)
        await world.until(controller, "succeeded")
        await world.seconds(controller, 12)
        (app,) = world.cluster.phases
        assert (world.cluster.apps[app].replica.version, world.cluster.apps[app].count) == ("2", 2)

    run(scenario())


def test_what_is_served_besides_stays_whatever_a_rollout_does(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(also_serve=["3"])
        await world.change(controller, "2", also_serve=["3", "1"])
        await world.until(controller, "succeeded")
        await world.seconds(controller, 12)
        assert versions_running(world) == ["1", "2", "3"]

    run(scenario())


@pytest.mark.parametrize(
    ("signature", "sentence"),
    [
        (
            replace(SIGNATURE, outputs=(TensorSpec("z", "FP32", (-1, 2)),)),
            "its outputs are z, not y",
        ),
        (
            replace(SIGNATURE, inputs=(TensorSpec("x", "FP16", (-1, 2)),)),
            r"its input 'x' is FP16\[-1, 2\], not FP32\[-1, 2\]",
        ),
    ],
)
def test_a_version_with_another_signature_is_refused(
    world: RolloutWorld, signature: Signature, sentence: str
) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        world.resolver.signatures["2"] = signature
        with pytest.raises(ConflictError, match=f"{sentence}; .*set rollout: immediate"):
            await world.change(controller, "2")
        with pytest.raises(ConflictError, match=sentence):
            await controller.start_rollout("m", "2", None)
        assert controller.state.apply_id == 1
        await world.change(controller, "2", rollout="immediate")
        await world.seconds(controller, 5)
        assert default(controller) == "2"

    run(scenario())


def test_a_dry_run_starts_nothing(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        models = {"m": {"version": "2", "rollout": QUICK}}
        plan = await world.apply(controller, models, dry_run=True)
        assert plan["changes"][1]["change"] == "rollout"
        assert controller.rollouts.records == ()
        assert world.store.rollouts() == []

    run(scenario())


# What goes wrong.


def test_a_version_that_never_becomes_ready_never_gets_a_request(world: RolloutWorld) -> None:
    async def scenario() -> None:
        world.cluster.broken.add("2")
        controller = await world.serving()
        await world.change(controller, "2")
        weights = []
        world.look = lambda c: weights.append(weight(c))
        record = await world.until(controller, "rolled_back")
        assert "the golden outputs differ" in record.rollout.reason
        assert set(weights) == {0.0}
        await world.seconds(controller, 3)
        assert versions_running(world) == ["1"]
        assert controller.reconciler.outcome == "converged"

    run(scenario())


def test_a_start_after_a_failed_one_tries_again(world: RolloutWorld) -> None:
    async def scenario() -> None:
        world.cluster.broken.add("2")
        controller = await world.serving()
        await world.change(controller, "2")
        await world.until(controller, "rolled_back")
        world.cluster.broken.clear()
        await controller.start_rollout("m", "2", QUICK)
        await world.until(controller, "succeeded", key="m:2")

    run(scenario())


def test_a_rollout_goes_on_without_the_registry(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        world.resolver.gone = True
        await world.until(controller, "succeeded")
        with pytest.raises(RegistryError, match="does not answer"):
            await controller.start_rollout("m", "3", None)

    run(scenario())


def test_a_stable_version_that_dies_is_no_reason_to_take_the_canary_back(
    world: RolloutWorld,
) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        world.cluster.silent.add("1")
        await world.seconds(controller, 10)
        assert weight(controller) == 1.0, "who is there answers"
        world.cluster.silent.clear()
        await world.until(controller, "succeeded")

    run(scenario())


def test_a_canary_that_dies_has_no_weight_and_is_taken_back(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        world.cluster.silent.add("2")
        await world.seconds(controller, 10)
        assert weight(controller) == 0.0
        record = await world.until(controller, "rolled_back")
        assert "no ready replica" in record.rollout.reason
        assert world.traffic.failures_seen_by_clients == 0

    run(scenario())


def test_replicas_that_come_and_go_are_a_crash_loop(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        for generation in (1, 2):
            world.cluster.generation["2"] = generation
            await world.second(controller)
        record = await world.until(controller, "rolled_back")
        assert len(record.rollout.restarts) == 2
        assert record.rollout.reason.startswith("crash_loop")

    run(scenario())


def test_a_breaker_that_opens_is_looked_at_at_once(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        slow = {**QUICK, "analysis": {"min_units": 8, "tick": 30}}
        await world.change(controller, "2", rollout=slow)
        await world.until(controller, "observing", at_most=300)
        await world.second(controller)
        gateway = world.traffic.fleet[0]
        gateway.splits["m:1"].update(breaker="open", opened=1)
        world.monotonic += 0.05
        controller.report(gateway.report())
        await controller.watch()
        verdicts = (await controller.rollouts.find("m")).rollout.verdicts
        breaker = next(v for v in verdicts if v.trigger == "breaker")
        assert "1 gateway(s) stopped sending" in breaker.sentence

    run(scenario())


def test_a_webhook_that_has_not_answered_holds_the_rollout(world: RolloutWorld) -> None:
    async def scenario() -> None:
        hooked = {**QUICK, "webhooks": [{"event": "pre-rollout", "url": "https://gate.invalid/"}]}
        controller = await world.serving()
        await world.change(controller, "2", rollout=hooked)
        await world.seconds(controller, 5)
        record = await controller.rollouts.find("m")
        assert record.rollout.state == "pending"
        assert versions_running(world) == ["1"], "nothing is started before it agrees"
        world.providers.answers["pre-rollout:0:0"] = ProviderState("ok")
        await world.until(controller, "observing")

    run(scenario())


# Restarts.


@pytest.mark.parametrize("then", ["abort", "resume"])
def test_what_may_not_begin_is_not_loaded_by_a_pause(world: RolloutWorld, then: str) -> None:
    webhook = {"event": "pre-rollout", "url": "http://change-freeze/ok"}
    plan = {**QUICK, "webhooks": [webhook]}

    async def scenario() -> None:
        controller = await world.serving(rollout=plan)
        await world.change(controller, "2", rollout=plan)
        await world.seconds(controller, 3)
        await tell(controller, "pause")
        await world.seconds(controller, 3)
        # Other settings of a rollout that is on its way.
        await world.change(controller, "2", rollout=plan, replicas=2)
        await world.seconds(controller, 3)
        await tell(controller, then)
        assert list(controller.state.desired.models["m"].versions) == ["1"]
        await world.seconds(controller, 3)
        assert [name for name in world.cluster.started if "-v2-" in name] == []
        expected = {"abort": "rolled_back", "resume": "pending"}
        assert (await controller.rollouts.find("m")).rollout.state == expected[then]

    run(scenario())


def test_a_version_that_is_not_ready_has_no_split_when_it_is_paused(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.serving(replicas=2)
        await world.change(controller, "2", replicas=2)
        await world.until(controller, "preparing")
        await tell(controller, "pause")
        await world.seconds(controller, 5)
        route = controller.board.table.models["m"]
        assert route.arms["2"].endpoints
        assert route.split is None
        await tell(controller, "resume")
        await world.until(controller, "succeeded")

    run(scenario())


def test_evidence_is_the_same_after_a_restart(world: RolloutWorld) -> None:
    async def scenario() -> None:
        world.traffic.versions["2"] = Version(failing=0.03)
        controller = await world.observing()
        await world.seconds(controller, 2)
        before = await controller.rollouts.find("m")
        again = await world.controller()
        world.announce(again)
        await again.watch()
        after = await again.rollouts.find("m")
        assert after.rollout == before.rollout
        assert any(v.log_e for v in after.rollout.verdicts)
        assert again.totals.trials.counts("m:1") == controller.totals.trials.counts("m:1")
        assert after.history == before.history

    run(scenario())


def test_what_is_late_stays_so_after_the_clock_was_set_back(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        await world.seconds(controller, 4)
        world.set_back = 600.0
        for second in range(3):
            seen = controller.rollouts.observer.sight(await controller.rollouts.find("m"))
            history = seen.history
            assert history[-1].at == seen.now
            assert [s.at for s in history] == sorted(s.at for s in history)
            of_late, ever = recent(history, 1.5).canary[0], history[-1].canary[0]
            assert 0 < of_late < ever, f"{second} s after the clock was set back"
            await world.second(controller)

    run(scenario())


def test_counts_survive_gateways_and_their_folding(world: RolloutWorld) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        await world.second(controller)
        trials = controller.totals.trials
        before = trials.counts("m:1")
        names = list(controller.totals._rows)
        base = controller.totals.folded(names)
        controller.totals.fold(base, names)
        assert trials.counts("m:1") == before
        late = world.traffic.fleet[0].report()
        controller.report(late)
        assert trials.counts("m:1") == before, "a late report of one that was folded counts nothing"

    run(scenario())


def test_no_gateway_goes_unheard_because_others_died_and_the_controller_restarted(
    world: RolloutWorld,
) -> None:
    async def scenario() -> None:
        controller = await world.serving()
        for n in range(MAX_INSTANCES + 1):
            controller.report(gateway_report(f"crashing-{n}"))
        await world.second(controller)
        again = await world.controller()
        # Replicas are heard before the first gateway.
        world.announce(again)
        await again.step(look=True)
        await world.seconds(again, 8)
        assert again.totals.live(world.monotonic, 1.0) == ["g0@1.0", "g1@1.0"]

    run(scenario())


def test_a_gateway_that_forgets_a_split_does_not_take_its_counts_along(
    world: RolloutWorld,
) -> None:
    async def scenario() -> None:
        controller = await world.observing()
        await world.second(controller)
        before = controller.totals.trials.counts("m:1")
        gateway = world.traffic.fleet[0]
        controller.report({**gateway.report(), "rollouts": {}})
        assert controller.totals.trials.counts("m:1") == before

    run(scenario())


def test_a_new_deployment_does_not_bring_back_what_was_taken_back(world: RolloutWorld) -> None:
    async def scenario() -> None:
        world.traffic.versions["2"] = Version(failing=0.6)
        controller = await world.serving()
        await world.change(controller, "2")
        await world.until(controller, "rolled_back")
        world.deployment, world.cluster.phases = "second", {}
        again = await world.controller()
        plan = await world.change(again, "2")
        changes = [(c["change"], c["version"]) for c in plan["changes"]]
        assert changes == [("start", "1"), ("held", "2")]
        await world.seconds(again, 5)
        assert default(again) == "1"

    run(scenario())


def test_a_rollout_that_a_new_deployment_cut_short_begins_again(world: RolloutWorld) -> None:
    async def scenario() -> None:
        await world.observing()
        world.deployment, world.cluster.phases = "second", {}
        again = await world.controller()
        assert again.rollouts.records == ()
        assert world.store.rollout("m:1").state == "rolled_back"
        plan = await world.change(again, "2")
        assert [(c["change"], c["version"]) for c in plan["changes"]] == [
            ("start", "1"),
            ("rollout", "2"),
        ]
        await world.until(again, "succeeded", key="m:2")
        assert default(again) == "2"

    run(scenario())
