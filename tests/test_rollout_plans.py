"""Plans as people write them: what they become, and what is said where they are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config import load_config, parse_config
from serving.core.compare import METRICS
from serving.core.rollout_spec import (
    KIND_DEFAULTS,
    METRIC_NAMES,
    OPTIONAL_KINDS,
    PLAN_NAMES,
    TRIGGER_KINDS,
    Gate,
    Override,
    RolloutSpec,
    Shadow,
    Step,
    Trigger,
    Webhook,
    default_plan,
)
from serving.errors import ConfigError
from serving.rollout_plans import load_plan, parse_plan

PLANS = Path(__file__).parent.parent / "configs/rollouts"
STEP = {"weight": 5, "hold": "1m"}


def parsed(text: str) -> RolloutSpec:
    return parse_plan(yaml.safe_load(text), source="p.yaml")


@pytest.mark.parametrize("name", PLAN_NAMES)
def test_the_plan_files_say_what_the_built_in_plans_are(name: str) -> None:
    assert load_plan(PLANS / f"{name}.yaml") == default_plan(name)
    assert parse_plan(name, source="-") == default_plan(name)
    assert {p.stem for p in PLANS.glob("*")} == set(PLAN_NAMES)


def test_the_commented_plan_has_every_setting() -> None:
    raw = yaml.safe_load((PLANS / "canary.yaml").read_text())
    # By default that of the model: a copy of the file does not change it.
    assert set(raw) | {"name", "ready_timeout"} == allowed(parse_error({"x": 1}))
    assert set(raw["analysis"]) == allowed(parse_error({"analysis": {"x": 1}}))
    assert set(raw["analysis"]["triggers"]) == set(TRIGGER_KINDS) - OPTIONAL_KINDS


@pytest.mark.parametrize("name", [*METRICS, "metrics.own:distance"])
def test_outputs_are_compared_by_a_built_in_metric_or_by_ones_own(name: str) -> None:
    found = parsed(f"{{shadow: {{compare: {{kind: metric, metric: '{name}', threshold: 0.1}}}}}}")
    assert found.shadow is not None
    compare = found.shadow.compare
    assert (compare.kind, compare.metric, compare.threshold) == ("metric", name, 0.1)


def test_plans_know_the_metrics_that_there_are() -> None:
    assert tuple(METRICS) == METRIC_NAMES


def parse_error(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_plan(raw, source="p.yaml")
    return str(error.value)


def allowed(message: str) -> set[str]:
    found = re.search(r"allowed here: ([\w, ]+)", message)
    assert found is not None
    return set(found[1].split(", "))


def test_a_plan_says_only_what_differs() -> None:
    spec = parsed("{plan: fast, shield: false, analysis: {alpha: 0.001}, shadow: {percent: 5}}")
    fast = default_plan("fast")
    assert (spec.shield, spec.analysis.alpha) == (False, 0.001)
    assert spec.shadow == Shadow(5, 200, 10)
    assert spec.steps == fast.steps
    assert spec.analysis.on_insufficient_data == fast.analysis.on_insufficient_data


def test_everything_that_can_be_written() -> None:
    spec = parsed(
        """
        name: mine
        assignment:
          unit: header:X-User
          overrides: [{header: X-Canary, value: always, to: canary}]
        shadow: off
        steps:
          - {weight: 2.5, hold: 90}
          - weight: 40
            hold: 1h30m
            require_pass: [errors, queue]
            gate: {type: webhook, url: "https://gate", timeout: 2d, on_timeout: rollback,
                   secret_env: GATE_KEY}
        analysis:
          triggers:
            drift: off
            cost: off
            errors: {delta: 0.01}
            strict: {kind: errors, weight: 0.1, r0: 1}
            queue: {kind: promql, url: "http://p:9090", query: up, operator: "<", threshold: 1,
                    interval: 500ms}
        webhooks: [{event: pre-step, url: "http://may-i", timeout: 3s}]
        feedback: {window: 10m}
        """
    )
    assert spec.plan == "mine"
    assert spec.assignment.unit == "header:X-User"
    assert spec.assignment.overrides == (Override("x-canary", "always", "canary"),)
    assert spec.shadow is None
    gate = Gate("webhook", 172_800, "rollback", "https://gate", secret_env="GATE_KEY")
    assert spec.steps == (Step(2.5, 90), Step(40, 5400, ("errors", "queue"), gate))
    assert spec.analysis.trigger("drift") is None
    errors, strict = spec.analysis.trigger("errors"), spec.analysis.trigger("strict")
    assert errors is not None
    assert strict is not None
    assert (errors.weight, errors.r0, errors.delta) == (0.3, 1.5, 0.01)
    assert (strict.weight, strict.r0, strict.delta) == (0.1, 1.0, 0.001)
    assert spec.analysis.trigger("queue") == Trigger(
        "queue",
        "promql",
        action="pause",
        url="http://p:9090",
        query="up",
        operator="<",
        threshold=1,
        interval_s=0.5,
    )
    assert spec.webhooks == (Webhook("pre-step", "http://may-i", 3),)
    assert spec.feedback is not None
    assert spec.feedback.window_s == 600
    assert RolloutSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{stepz: 1}", "unknown key 'stepz'; allowed here: analysis, assignment, bake,"),
        ("{plan: quick}", "plan: 'quick' is no plan; allowed: canary, blue-green, shadow-only,"),
        (
            "{steps: [{weight: 5, hold: 2 min}]}",
            "steps.0.hold: '2 min' is no duration; allowed: seconds, or a text like",
        ),
        ("{steps: [{weight: 5, hold: -1}]}", "steps.0.hold: must be greater than or equal"),
        ("{steps: [{weight: 5, hold: yes}]}", "steps.0.hold: True is no duration"),
        ("{keep_previous: .inf}", "keep_previous: must be a finite number (found inf)"),
        (
            "{steps: [{weight: 5, hold: 1, wait: 3}]}",
            "unknown key 'steps.0.wait'; allowed here: gate, hold, require_pass, weight",
        ),
        ("{steps: [{hold: 1}]}", "steps.0.weight: is missing"),
        ("{steps: [{weight: 100, hold: 1}]}", "steps.0.weight: must be less than 100"),
        ("{steps: 5}", "steps: 5 is no list"),
        ("{steps: }", "'steps' has nothing after it"),
        ("{bake: 1h}", "bake: '1h' is no mapping of settings"),
        ("{analysis: }", "'analysis' has nothing after it; write its settings"),
        (
            "{steps: [{weight: 5, hold: 1}, {weight: 2, hold: 1}]}",
            "steps.1.weight: 2 is less than the step before; weights may only grow",
        ),
        (
            "{steps: [{weight: 5, hold: 1, require_pass: [p99]}]}",
            "steps.0.require_pass: 'p99' is no trigger; allowed: errors, latency, disagreement,",
        ),
        (
            "{steps: [{weight: 5, hold: 1, gate: {type: webhook}}]}",
            "steps.0.gate: type: webhook and url belong together",
        ),
        (
            "{steps: [{weight: 5, hold: 1, gate: {typ: manual}}]}",
            "unknown key 'steps.0.gate.typ'; allowed here: on_timeout, secret_env, timeout,",
        ),
        (
            "{assignment: {unit: user}}",
            "assignment.unit: 'user' is no unit; allowed: request, header:NAME, cookie:NAME,",
        ),
        (
            "{assignment: {overrides: [{header: 'a b', value: x}]}}",
            "assignment.overrides.0.header: 'a b' is no name of a header",
        ),
        (
            "{shadow: {compare: {kind: metric}}}",
            "shadow.compare: kind: metric and metric: NAME belong together; allowed: max_abs, "
            "max_rel, cosine, mse, or module:function",
        ),
        ("{shadow: {compare: {metric: mse}}}", "kind: metric and metric: NAME belong together"),
        (
            "{shadow: {compare: {kind: metric, metric: rmse}}}",
            "shadow.compare.metric: 'rmse' is no metric; allowed: max_abs, max_rel, cosine, mse, "
            "or module:function",
        ),
        ("{shadow: {percent: 200}}", "shadow.percent: must be less than or equal to 100"),
        (
            "{webhooks: [{event: done, url: x}]}",
            "webhooks.0.event: must be 'pre-rollout', 'pre-step', 'post-rollout' or",
        ),
        ("{webhooks: [{event: event, url: x}]}", "webhooks.0.url: 'x' is no URL; allowed: http://"),
        (
            "{webhooks: [{event: event, url: 'http://a', secret_env: a-b}]}",
            "webhooks.0.secret_env: 'a-b' is no name of an environment variable",
        ),
        (
            "{analysis: {triggers: {q: {kind: webhook, url: 'http://p', interval: 0}}}}",
            "analysis.triggers.q.interval: 0 is too short; allowed: more than 0 s, as in",
        ),
        (
            "{analysis: {triggers: {q: {kind: webhook, url: 'http://p', timeout: 0s}}}}",
            "analysis.triggers.q.timeout: '0s' is too short; allowed: more than 0 s, as in",
        ),
        (
            "{analysis: {triggers: {q: {kind: promql, url: 'http://p', query: up, threshold: 1, "
            "interval: -15}}}}",
            "analysis.triggers.q.interval: -15 is too short; allowed: more than 0 s, as in",
        ),
        (
            "{steps: [{weight: 5, hold: 1, gate: {timeout: 0}}]}",
            "steps.0.gate.timeout: 0 is too short; allowed: more than 0 s, as in",
        ),
        (
            "{webhooks: [{event: event, url: 'http://a', timeout: 0.0}]}",
            "webhooks.0.timeout: 0.0 is too short; allowed: more than 0 s, as in",
        ),
        ("{ready_timeout: 0}", "ready_timeout: 0 is too short; allowed: more than 0 s, as in"),
        (
            "{analysis: {triggers: {crash_loop: {window: 0}}}}",
            "analysis.triggers.crash_loop.window: 0 is too short; allowed: more than 0 s",
        ),
        ("{feedback: {window: 0}}", "feedback.window: 0 is too short; allowed: more than 0 s"),
        ("{analysis: {triggers: [errors]}}", "['errors'] is no mapping of settings"),
        (
            "{analysis: {triggers: {errors: 3}}}",
            "analysis.triggers.errors: write its settings, or `off` without it",
        ),
        (
            "{analysis: {triggers: {p99: {}}}}",
            "analysis.triggers.p99: 'p99' is no kind of trigger; allowed: errors, latency,",
        ),
        (
            "{analysis: {triggers: {errors: {query: up}}}}",
            "unknown key 'analysis.triggers.errors.query'; allowed here: action, delta, kind, r0,",
        ),
        (
            "{analysis: {triggers: {q: {kind: promql, url: 'http://p', query: up}}}}",
            "analysis.triggers.q.threshold: is missing",
        ),
        (
            "{analysis: {triggers: {latency: {weight: 0.9}}}}",
            "analysis.triggers: the weights add up to 1.65; they share one error budget, so at "
            "most 1: errors 0.3, latency 0.9, disagreement 0.2, drift 0.05, labels 0.05, cost 0.15",
        ),
        (
            "{analysis: {triggers: {cost: {tolerance: -0.1}}}}",
            "analysis.triggers.cost.tolerance: must be greater than or equal to 0",
        ),
        (
            "{analysis: {triggers: {cost: {r0: 1.5}}}}",
            "unknown key 'analysis.triggers.cost.r0'; allowed here: action, kind, tolerance, "
            "weight",
        ),
        (
            "{analysis: {triggers: {oom: {weight: 0.1}}}}",
            "unknown key 'analysis.triggers.oom.weight'; allowed here: action, failures, kind, "
            "window",
        ),
        (
            "{analysis: {triggers: {gpu_memory_headroom: {threshold: 20}}}}",
            "analysis.triggers.gpu_memory_headroom.threshold: must be less than 1",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(text)
    assert str(error.value).startswith("p.yaml: ")
    assert message in str(error.value)


def test_every_kind_of_trigger_has_defaults_and_settings() -> None:
    assert set(KIND_DEFAULTS) == set(TRIGGER_KINDS)
    for kind in TRIGGER_KINDS:
        message = parse_error({"analysis": {"triggers": {"t": {"kind": kind, "x": 1}}}})
        assert {"kind", "action"} < allowed(message)


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    with pytest.raises(ConfigError, match=r"p\.yaml: cannot be read: No such file"):
        load_plan(path)
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected a mapping at the top level, found list"):
        load_plan(path)
    path.write_text("a: [\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_plan(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="expected a mapping at the top level, found nothing"):
        load_plan(path)


# In the configuration.


def config(rollout: object) -> RolloutSpec | None:
    raw = {"models": {"digits": {"rollout": rollout}}}
    return parse_config(raw, source="f.yaml").models["digits"].rollout_plan


def test_a_model_rolls_out_by_the_plan_that_it_names() -> None:
    default = parse_config({"models": {"digits": {}}}, source="f.yaml").models["digits"]
    assert default.rollout_plan == default_plan("canary")
    assert config("fast") == default_plan("fast")
    assert config("immediate") is None
    changed = config({"plan": "fast", "bake": {"duration": "3s"}})
    assert changed is not None
    assert changed.bake.duration_s == 3


@pytest.mark.parametrize("rollout", ["fast", {"plan": "fast"}])
def test_a_plan_waits_as_long_for_a_version_as_its_model(rollout: object) -> None:
    models = {"digits": {"rollout": rollout, "ready_timeout_s": 1800}}
    plan = parse_config({"models": models}, source="f.yaml").models["digits"].rollout_plan
    assert plan is not None
    assert plan.ready_timeout_s == 1800


def test_a_plan_may_wait_less_than_its_model_and_not_longer() -> None:
    def timeout(ready_timeout: str) -> float:
        models = {"digits": {"rollout": {"ready_timeout": ready_timeout}, "ready_timeout_s": 60}}
        plan = parse_config({"models": models}, source="f.yaml").models["digits"].rollout_plan
        assert plan is not None
        return plan.ready_timeout_s

    assert timeout("20s") == 20
    with pytest.raises(ConfigError) as error:
        timeout("2m")
    assert str(error.value) == (
        "f.yaml: models.digits.rollout: ready_timeout: 120 s is more than the model's "
        "ready_timeout_s, after which a version is given up; allowed: at most 60 s"
    )


@pytest.mark.parametrize("rollout", ["quick", 5, None, ["fast"]])
def test_a_model_that_names_no_plan_is_told_the_names(rollout: object) -> None:
    with pytest.raises(ConfigError) as error:
        config(rollout)
    assert str(error.value) == (
        f"f.yaml: models.digits.rollout: {rollout!r} is no plan; allowed: canary, blue-green, "
        "shadow-only, fast, immediate, a path to a .yaml file, or a mapping"
    )


def test_a_wrong_plan_inside_the_configuration_is_named_by_its_key() -> None:
    with pytest.raises(ConfigError) as error:
        config({"bake": {"time": 3}})
    assert str(error.value) == (
        "f.yaml: models.digits.rollout: unknown key 'bake.time'; allowed here: duration"
    )


def test_a_plan_file_is_found_beside_the_configuration_and_travels_with_it(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans/slow.yaml").write_text("bake: {duration: 2d}\n")
    file = tmp_path / "serving.yaml"
    file.write_text("models: {digits: {rollout: plans/slow.yaml}}\n")
    loaded = load_config(file)
    (tmp_path / "plans/slow.yaml").unlink()
    again = parse_config(json.loads(loaded.model_dump_json()), source="wire")
    for found in (loaded, again):
        plan = found.models["digits"].rollout_plan
        assert plan is not None
        assert (plan.plan, plan.bake.duration_s) == ("slow", 172_800)


def test_a_wrong_plan_file_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text("bake: {duration: 2 days}\n")
    file = tmp_path / "serving.yaml"
    file.write_text("models: {digits: {rollout: slow.yaml}}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert str(error.value).startswith(f"{tmp_path / 'slow.yaml'}: bake.duration: '2 days' is no")
