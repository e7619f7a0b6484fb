"""The plan: what starts, what is routed, what stops, in which order."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serving.core.plan import (
    AppSpec,
    Change,
    GatewayView,
    Layout,
    ObservedApp,
    Phase,
    ServedModel,
    ServedVersion,
    compare,
    decide,
    is_drained,
    route_table,
)
from serving.core.replica import ReplicaSpec
from serving.core.routing import Arm, Endpoint
from serving.core.types import Batch, Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),), Batch.DYNAMIC
)


def served(
    version: str, *, max_size: int = 8, count: int = 1, timeout_s: float = 30
) -> ServedVersion:
    digest = f"sha256:{version}"
    replica = ReplicaSpec("m", version, digest, "/home", "", max_size=max_size)
    arm = Arm("m", version, digest, "onnxruntime_onnx", SIGNATURE, timeout_s=timeout_s)
    return ServedVersion(AppSpec(replica, count, ready_timeout_s=60), arm)


def layout(default: str, *versions: ServedVersion) -> Layout:
    return Layout({"m": ServedModel(default, {v.arm.version: v for v in versions})})


def endpoint(app: AppSpec, number: int = 0) -> Endpoint:
    return Endpoint(f"{app.name}-{number}", "node", f"/run/{app.name}/{number}.sock")


def ready(one: ServedVersion) -> dict[str, ObservedApp]:
    endpoints = tuple(endpoint(one.app, i) for i in range(one.app.count))
    return {one.app.name: ObservedApp(Phase.RUNNING, endpoints)}


def seen(one: ServedVersion, phase: Phase, **facts: object) -> dict[str, ObservedApp]:
    return {one.app.name: ObservedApp(phase, **facts)}  # type: ignore[arg-type]


NOTHING = Layout()


def test_a_first_version_is_started_and_routed_when_it_is_ready() -> None:
    one = served("1")
    desired = layout("1", one)
    first = decide(desired, NOTHING, {}, {})
    assert first.start == (one.app,)
    assert first.routed == NOTHING
    assert first.pending == (one.app.name,)
    waiting = decide(desired, NOTHING, seen(one, Phase.STARTING), {})
    assert waiting.start == ()
    assert waiting.routed == NOTHING
    done = decide(desired, NOTHING, ready(one), {})
    assert done.routed == desired
    assert done.pending == ()


def test_all_replicas_must_be_ready() -> None:
    two = served("1", count=2)
    half = {two.app.name: ObservedApp(Phase.STARTING, (endpoint(two.app),))}
    assert decide(layout("1", two), NOTHING, half, {}).routed == NOTHING
    assert decide(layout("1", two), NOTHING, ready(two), {}).routed == layout("1", two)


def test_the_old_version_stays_until_the_new_one_is_ready_and_is_then_retired() -> None:
    old, new = served("1"), served("2")
    routed, desired = layout("1", old), layout("2", new)
    before = decide(desired, routed, {**ready(old), **seen(new, Phase.STARTING)}, {})
    assert before.routed == routed
    assert before.retire == ()
    after = decide(desired, routed, {**ready(old), **ready(new)}, {})
    assert after.routed == desired
    assert after.retire == (old.app.name,)


def test_a_changed_replica_setting_is_another_application_of_the_same_version() -> None:
    old, new = served("1", max_size=8), served("1", max_size=16)
    assert old.app.name != new.app.name
    before = decide(layout("1", new), layout("1", old), ready(old), {})
    assert before.start == (new.app,)
    assert before.routed == layout("1", old)
    after = decide(layout("1", new), layout("1", old), {**ready(old), **ready(new)}, {})
    assert after.routed == layout("1", new)
    assert after.retire == (old.app.name,)


def test_a_gateway_setting_changes_the_routes_and_no_application() -> None:
    old, new = served("1", timeout_s=30), served("1", timeout_s=5)
    assert old.app.name == new.app.name
    decision = decide(layout("1", new), layout("1", old), ready(old), {})
    assert decision.routed == layout("1", new)
    assert (decision.start, decision.retire, decision.pending) == ((), (), ())


def test_sockets_and_application_name_do_not_make_another_application() -> None:
    app = served("1").app
    moved = replace(app, replica=replace(app.replica, run_dir="/elsewhere", app="whatever"))
    assert moved.name == app.name
    assert replace(app, ready_timeout_s=1).name == app.name
    assert replace(app, count=2).name == app.name


@pytest.mark.parametrize(
    "facts",
    [
        {"phase": Phase.FAILED},
        {"phase": Phase.STARTING, "error": "digest differs"},
        {"phase": Phase.STARTING, "age_s": 61.0},
    ],
)
def test_a_version_that_does_not_become_ready_is_given_up_and_the_old_one_serves(
    facts: dict[str, object],
) -> None:
    old, new = served("1"), served("2")
    world = {**ready(old), new.app.name: ObservedApp(**facts)}  # type: ignore[arg-type]
    decision = decide(layout("2", new), layout("1", old), world, {})
    assert decision.routed == layout("1", old)
    assert list(decision.given_up) == [new.app.name]
    assert decision.retire == (new.app.name,)
    assert decision.pending == ()
    later = decide(layout("2", new), layout("1", old), ready(old), decision.given_up)
    assert later.start == (), "it is not tried again before the next apply"
    assert later.given_up == decision.given_up


def test_the_error_of_a_replica_is_the_reason() -> None:
    one = served("1")
    world = seen(one, Phase.STARTING, error="model.onnx: its SHA-256 is …")
    decision = decide(layout("1", one), NOTHING, world, {})
    assert decision.given_up == {one.app.name: "model.onnx: its SHA-256 is …"}


def test_an_unready_version_that_serves_already_is_not_given_up() -> None:
    one = served("1")
    world = seen(one, Phase.RUNNING, error="out of memory", age_s=999.0)
    decision = decide(layout("1", one), layout("1", one), world, {})
    assert decision.given_up == {}
    assert decision.routed == layout("1", one)


def test_an_application_on_its_way_out_is_not_ready() -> None:
    one = served("1")
    leaving = {one.app.name: replace(ready(one)[one.app.name], phase=Phase.DELETING)}
    decision = decide(layout("1", one), NOTHING, leaving, {})
    assert decision.routed == NOTHING
    assert decision.start == (), "it is started when it is gone"


def test_a_routed_application_that_vanished_is_started_again() -> None:
    one = served("1")
    decision = decide(layout("1", one), layout("1", one), {}, {})
    assert decision.start == (one.app,)
    assert decision.routed == layout("1", one)


def test_a_model_that_is_no_longer_asked_for_leaves_at_once() -> None:
    one = served("1")
    decision = decide(NOTHING, layout("1", one), ready(one), {})
    assert decision.routed == NOTHING
    assert decision.retire == (one.app.name,)


def test_an_application_nobody_knows_is_retired() -> None:
    stray = {"model-x-v1-00000000": ObservedApp(Phase.RUNNING)}
    assert decide(NOTHING, NOTHING, stray, {}).retire == ("model-x-v1-00000000",)


def test_a_second_version_may_fail_without_the_first() -> None:
    one, two = served("1"), served("2")
    world = {**ready(one), **seen(two, Phase.FAILED)}
    decision = decide(layout("1", one, two), NOTHING, world, {})
    assert decision.routed == layout("1", one)
    assert list(decision.given_up) == [two.app.name]


def test_the_default_switches_to_a_version_that_is_served_already() -> None:
    one, two = served("1"), served("2")
    world = {**ready(one), **ready(two)}
    decision = decide(layout("2", two), layout("1", one, two), world, {})
    assert decision.routed == layout("2", two)
    assert decision.retire == (one.app.name,)


def test_a_layout_survives_its_json_form() -> None:
    original = layout("2", served("1", count=3), served("2", max_size=4))
    assert Layout.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_the_table_has_the_ready_replicas() -> None:
    one = served("1")
    table = route_table(layout("1", one), {one.app.name: (endpoint(one.app),)}, 7)
    assert table.revision == 7
    assert table.models["m"].arms["1"].endpoints == (endpoint(one.app),)
    assert route_table(layout("1", one), {}, 8).models["m"].arms["1"].endpoints == ()


def test_drained_means_every_gateway_left_and_answered() -> None:
    def view(revision: int, unanswered: int) -> GatewayView:
        return GatewayView(revision, {("m", "1"): unanswered})

    assert is_drained("m", "1", 5, [])
    assert is_drained("m", "1", 5, [view(5, 0), view(6, 0)])
    assert not is_drained("m", "1", 5, [view(5, 0), view(4, 0)])
    assert not is_drained("m", "1", 5, [view(5, 1)])
    assert is_drained("m", None, 5, [view(5, 1)]), "the other application's requests"


def changes(new: Layout, desired: Layout, routed: Layout, *failed: str) -> list[tuple[str, str]]:
    rows = compare(new, desired, routed, dict.fromkeys(failed, "error"))
    return [(row.change.value, row.version) for row in rows]


def test_what_an_apply_changes() -> None:
    one, two = served("1"), served("2")
    a, b = layout("1", one), layout("2", two)
    assert changes(a, NOTHING, NOTHING) == [("start", "1")]
    assert changes(a, a, a) == [("unchanged", "1")]
    assert changes(b, a, a) == [("stop", "1"), ("start", "2")]
    assert changes(NOTHING, a, a) == [("stop", "1")]
    assert changes(layout("1", one, two), a, a) == [("unchanged", "1"), ("start", "2")]
    both = layout("1", one, two)
    assert changes(layout("2", one, two), both, both) == [("unchanged", "1"), ("update", "2")]


def test_what_an_apply_changes_in_a_version() -> None:
    old, sized, timed = served("1"), served("1", max_size=2), served("1", timeout_s=1)
    (row,) = compare(layout("1", sized), layout("1", old), layout("1", old), {})
    assert (row.change, row.reason) == (Change.REPLACE, "changed: max_size")
    (row,) = compare(layout("1", timed), layout("1", old), layout("1", old), {})
    assert (row.change, row.reason) == (Change.UPDATE, "changed: timeout_s")


def test_an_apply_is_compared_with_what_runs_and_what_is_on_its_way() -> None:
    one, two = served("1"), served("2")
    a, b = layout("1", one), layout("2", two)
    assert changes(b, b, a) == [("stop", "1"), ("unchanged", "2")], "2 is being started"
    assert changes(a, b, a) == [("update", "1"), ("stop", "2")], "back before 2 was ready"
    assert changes(a, b, a, two.app.name) == [("unchanged", "1")], "2 failed"
    assert changes(b, b, a, two.app.name) == [("stop", "1"), ("start", "2")], "tried again"


VERSIONS = st.sampled_from(["1", "2", "3"])
CHOICES = st.dictionaries(
    VERSIONS, st.tuples(st.sampled_from([8, 16]), st.integers(1, 2)), min_size=1, max_size=3
)


class World(RuleBasedStateMachine):
    """A cluster that starts, fails and loses applications as it likes, and a controller's ticks."""

    @initialize()
    def begin(self) -> None:
        self.desired, self.routed = NOTHING, NOTHING
        self.given_up: dict[str, str] = {}
        self.apps: dict[str, ObservedApp] = {}
        self.specs: dict[str, AppSpec] = {}

    @rule(choices=CHOICES, data=st.data())
    def apply(self, choices: dict[str, tuple[int, int]], data: st.DataObject) -> None:
        default = data.draw(st.sampled_from(sorted(choices)))
        versions = [served(v, max_size=m, count=c) for v, (m, c) in choices.items()]
        self.desired, self.given_up = layout(default, *versions), {}
        self.specs |= self.desired.apps()

    @rule()
    def tick(self) -> None:
        before = self.routed
        decision = decide(self.desired, self.routed, self.apps, self.given_up)
        for name in decision.routed.apps().keys() - before.apps().keys():
            assert len(self.apps[name].endpoints) == self.specs[name].count, "routed unready"
        for name, model in before.models.items():
            if name in self.desired.models:
                after = decision.routed.models[name]
                assert after.version in after.versions
                if after.version != self.desired.models[name].version:
                    assert after.version == model.version, "a default nobody asked for"
        assert not set(decision.retire) & decision.routed.apps().keys(), "retired what is routed"
        self.routed, self.given_up = decision.routed, dict(decision.given_up)
        for app in decision.start:
            assert app.name not in self.apps, "started twice"
            self.apps[app.name] = ObservedApp(Phase.STARTING)
        for name in decision.retire:
            self.apps[name] = ObservedApp(Phase.DELETING)

    @rule(data=st.data())
    def serve_acts(self, data: st.DataObject) -> None:
        if not self.apps:
            return
        name = data.draw(st.sampled_from(sorted(self.apps)))
        if self.apps[name].phase is Phase.DELETING:
            del self.apps[name]
            return
        event = data.draw(st.sampled_from(["ready", "fail", "lose replica", "vanish"]))
        if event == "ready":
            self._make_ready(name)
        elif event == "fail" and self.apps[name].phase is Phase.STARTING:
            self.apps[name] = ObservedApp(Phase.FAILED, error="broken")
        elif event == "lose replica":
            self.apps[name] = replace(self.apps[name], endpoints=self.apps[name].endpoints[1:])
        elif event == "vanish":
            del self.apps[name]

    def _make_ready(self, name: str) -> None:
        app = self.specs[name]
        endpoints = tuple(endpoint(app, i) for i in range(app.count))
        self.apps[name] = ObservedApp(Phase.RUNNING, endpoints)

    @invariant()
    def routes_are_whole(self) -> None:
        if hasattr(self, "routed"):
            for model in self.routed.models.values():
                assert model.version in model.versions

    @rule()
    def settle(self) -> None:
        """If all goes well from here, what was asked for is what runs."""
        self.given_up = {}
        for _ in range(10):
            self.apps = {n: a for n, a in self.apps.items() if a.phase is not Phase.DELETING}
            for name in list(self.apps):
                if name in self.desired.apps():
                    self._make_ready(name)
            self.tick()
        assert self.routed == self.desired
        assert {n for n, a in self.apps.items() if a.phase is not Phase.DELETING} == set(
            self.desired.apps()
        )


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(choices=CHOICES)
def test_comparing_a_layout_with_itself_changes_nothing(
    choices: dict[str, tuple[int, int]],
) -> None:
    versions = [served(v, max_size=m, count=c) for v, (m, c) in choices.items()]
    same = layout(versions[0].arm.version, *versions)
    assert {row.change for row in compare(same, same, same, {})} == {Change.UNCHANGED}
