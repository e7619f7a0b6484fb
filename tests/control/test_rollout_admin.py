"""Rollouts, audit and feedback over the admin API, in metrics and in the status."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.control import feedback as module
from serving.control.admin import create_app
from serving.control.controller import Controller
from serving.control.feedback import MAX_ITEMS, MAX_PENDING, REPEAT_S, Feedback
from serving.control.metrics import exposition
from serving.control.status import status
from serving.errors import ConflictError, InvalidRequest
from tests.control.rollout_world import QUICK, RolloutWorld, weight
from tests.control.traffic import Version

Scenario = Callable[[Controller, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def world(tmp_path: Path) -> RolloutWorld:
    return RolloutWorld(tmp_path)


def play(world: RolloutWorld, scenario: Scenario) -> None:
    async def run() -> None:
        controller = await world.serving()
        app = create_app(controller, host="127.0.0.1", ray_version="2.60")
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8002") as c:
            await scenario(controller, c)

    asyncio.run(run())


WHO = {"actor": "alice", "reason": "a test"}


def test_a_rollout_from_start_to_end(world: RolloutWorld) -> None:
    async def scenario(controller: Controller, client: httpx.AsyncClient) -> None:
        body = {"model": "m", "to": 2, "plan": QUICK, **WHO}
        started = (await client.post("/v1/rollouts", json=body)).json()
        assert (started["id"], started["canary"], started["actor"]) == ("m:1", "2", "alice")
        await world.until(controller, "observing")
        await world.seconds(controller, 2)
        shown = (await client.get("/v1/rollouts/m")).json()
        assert (await client.get("/v1/rollouts/m%3A1")).json() == shown
        assert shown["state"] == "observing"
        assert {v["trigger"] for v in shown["verdicts"]} >= {"errors", "latency"}
        canary, stable = shown["arms"]["canary"], shown["arms"]["stable"]
        assert (canary["version"], canary["weight"], canary["ready"]) == ("2", 0.2, 1)
        assert (stable["version"], stable["weight"], stable["wanted"]) == ("1", 0.8, 1)
        assert 0 < canary["requests"] < stable["requests"]
        assert 0.003 < canary["p50_s"] < 0.008
        assert shown["shadowed"]["pairs"] >= 20
        assert shown["next"].startswith("Step 2 (50 %) begins")
        listed = (await client.get("/v1/rollouts?model=m&active=true")).json()["rollouts"]
        assert [r["id"] for r in listed] == ["m:1"]
        told = await client.post(
            "/v1/rollouts/m/rollback", json={**WHO, "expected_state": "observing"}
        )
        assert told.json()["state"] == "rolling_back"
        assert weight(controller) == 0.0
        await world.until(controller, "rolled_back")
        assert (await client.get("/v1/rollouts?active=true")).json() == {"rollouts": []}
        assert (await client.get("/v1/rollouts?model=m&active=true")).json() == {"rollouts": []}
        ended = (await client.get("/v1/rollouts/m")).json()
        assert ended["arms"]["canary"]["requests"] >= canary["requests"]
        assert (ended["actor"], ended["reason"]) == ("alice", "a test"), "who took it back"
        *_, told, effect = (await client.get("/v1/audit?subject=m:1")).json()["entries"]
        assert (told["actor"], told["action"]) == ("alice", "rollback")
        assert (effect["actor"], effect["action"]) == ("controller", "rolled_back")

    play(world, scenario)


def test_what_a_rollout_would_do(world: RolloutWorld) -> None:
    async def scenario(controller: Controller, client: httpx.AsyncClient) -> None:
        await world.seconds(controller, 15)
        found = (await client.post("/v1/rollouts/plan", json={"model": "m", "to": "2"})).json()
        assert (found["stable"], found["canary"], found["spec"]["plan"]) == ("1", "2", "fast")
        assert found["requests_per_s"] == pytest.approx(40, rel=0.2)
        assert {d["trigger"] for d in found["detections"]} >= {"errors", "latency"}
        assert all(d["regression"] for d in found["detections"])
        assert {s["step"]: s["seconds"] for s in found["steps"]}.keys() == {-1, 0, 1}
        assert all(s["timeout"] is None for s in found["steps"])
        assert controller.rollouts.records == ()

    play(world, scenario)


@pytest.mark.parametrize(
    ("path", "body", "status_code", "slug", "sentence"),
    [
        ("/v1/rollouts", {"model": "m"}, 400, "invalid_request", "to is missing"),
        ("/v1/rollouts", {"model": "m", "to": "two"}, 400, "invalid_request", "is no version"),
        ("/v1/rollouts", {"model": "m", "to": True}, 400, "invalid_request", "to is missing"),
        ("/v1/rollouts", {"model": "m", "to": "9"}, 502, "registry", "no version 9"),
        ("/v1/rollouts", {"model": "x", "to": "2"}, 404, "not_found", "not served; served: m"),
        ("/v1/rollouts", {"model": "m", "to": "2", "plan": 7}, 400, "invalid_request", "plan"),
        (
            "/v1/rollouts",
            {"model": "m", "to": "2", "plan": "x"},
            400,
            "config",
            "model 'm': plan: 'x' is no plan",
        ),
        *(
            (path, {"model": "m", "to": "2", "plan": plan}, 400, "config", sentence)
            for path in ("/v1/rollouts", "/v1/rollouts/plan")
            for plan, sentence in (
                ({"feedback": {"output": "q"}}, "feedback.output is 'q'; the model's outputs: "),
                ({"shadow": {"compare": {"output": "q"}}}, "shadow.compare.output is 'q'; the"),
            )
        ),
        ("/v1/rollouts", {"model": "m", "to": "1"}, 409, "conflict", "version 1 already"),
        ("/v1/rollouts", {"model": "m", "to": "2", "by": 1}, 400, "invalid_request", "key by"),
        (
            "/v1/rollouts",
            {"model": "m", "to": "2", "actor": "a\0b"},
            400,
            "invalid_request",
            "actor is a string",
        ),
        ("/v1/rollouts/m/pause", {}, 404, "not_found", "has had no rollout yet"),
        (
            "/v1/rollouts/m/pause",
            {"expected_state": "going"},
            400,
            "invalid_request",
            "expected_state is 'going'; allowed: pending, preparing",
        ),
        ("/v1/rollouts/m/explode", {}, 404, "not_found", "allowed: pause, resume"),
        ("/v1/feedback", {"label": 1}, 400, "invalid_request", "request_id is"),
        ("/v1/feedback", [], 400, "invalid_request", "expected 1 to 1000"),
    ],
)
def test_what_is_wrong_is_said(
    world: RolloutWorld, path: str, body: Any, status_code: int, slug: str, sentence: str
) -> None:
    async def scenario(controller: Controller, client: httpx.AsyncClient) -> None:
        reply = await client.post(path, json=body)
        assert (reply.status_code, reply.json()["slug"]) == (status_code, slug)
        assert sentence in reply.json()["error"]
        assert controller.rollouts.records == ()

    play(world, scenario)


def test_the_audit_log_is_read_and_checked(world: RolloutWorld) -> None:
    async def scenario(controller: Controller, client: httpx.AsyncClient) -> None:
        body = {"model": "m", "to": "2", "plan": QUICK, **WHO}
        await client.post("/v1/rollouts", json=body)
        await client.post("/v1/rollouts/m/abort", json={**WHO, "reason": "on second thoughts"})
        entries = (await client.get("/v1/audit?subject=m:1")).json()["entries"]
        assert [e["action"] for e in entries] == ["start", "abort"]
        assert (entries[1]["actor"], entries[1]["body"]["reason"]) == (
            "alice",
            "on second thoughts",
        )
        first = (await client.get("/v1/audit?after=0&limit=1")).json()["entries"]
        assert [(e["seq"], e["action"]) for e in first] == [(1, "apply")]
        verified = (await client.get("/v1/audit/verify")).json()
        assert verified["sentence"].startswith("3 entries, as written")
        for query in ("limit=0", "limit=x", "after=-1", "page=2"):
            assert (await client.get(f"/v1/audit?{query}")).status_code == 400
        assert (await client.get("/v1/rollouts?active=maybe")).status_code == 400

    play(world, scenario)


def test_a_rollout_in_metrics_and_in_the_status(world: RolloutWorld) -> None:
    async def scenario(controller: Controller, client: httpx.AsyncClient) -> None:
        world.traffic.versions["2"] = Version(failing=0.05, disagreeing=0.3, wrong=0.5)
        recorded_only = {**QUICK, "analysis": {"min_units": 8, "dry_run": True}}
        await world.change(controller, "2", rollout=recorded_only)
        await world.until(controller, "observing")
        await world.seconds(controller, 2)
        found = {
            (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "model")): sample
            for family in text_string_to_metric_families(exposition(controller, "2.60").decode())
            for sample in family.samples
            if "rollout" in sample.name or "feedback" in sample.name
        }
        values = {key: sample.value for key, sample in found.items()}
        assert values["serving_rollout_weight", "m:1"] == 0.2
        assert values["serving_rollout_state", "2", "m:1", "1", "observing"] == 1.0
        assert ("serving_rollout_evidence", "m:1", "errors") in values
        assert values["serving_rollout_evidence_threshold", "m:1", "errors"] == pytest.approx(
            2.5228787
        )
        answered = values["serving_rollout_requests_total", "stable", "answered", "m:1"]
        failed = values["serving_rollout_requests_total", "canary", "failed", "m:1"]
        shielded = values["serving_rollout_requests_total", "canary", "shielded", "m:1"]
        assert answered > 0
        assert failed == shielded
        pairs = [
            values["serving_rollout_shadow_pairs_total", outcome, "m:1"]
            for outcome in ("agreed", "disagreed")
        ]
        assert pairs[0] > pairs[1] > 0
        assert values["serving_rollout_accuracy", "stable", "m:1"] == 1.0
        assert values["serving_rollout_accuracy", "canary", "m:1"] < 1.0
        assert (
            values["serving_feedback_pending",] == values["serving_feedback_dropped_total",] == 0.0
        )
        assert values["serving_feedback_forgotten_total", "m:1"] == 0.0
        (model,) = status(controller)["models"]
        assert model["rollout"]["id"] == "m:1"
        assert (model["version"], model["rollout"]["weight"]) == ("1", 0.2)
        assert [v["state"] for v in model["versions"]] == ["ready", "ready"]

    play(world, scenario)


# Feedback.


WINDOW_S = 600.0
LABELLED = {**QUICK, "feedback": {"window": "10m"}}


def test_a_label_goes_to_every_gateway_until_one_has_joined_it(world: RolloutWorld) -> None:
    async def scenario(controller: Controller, client: httpx.AsyncClient) -> None:
        refused = await client.post("/v1/feedback", json={"request_id": "r0", "label": 1})
        assert (refused.status_code, refused.json()["slug"]) == (409, "conflict")
        assert "no rollout that runs has `feedback`" in refused.json()["error"]
        await client.post("/v1/rollouts", json={"model": "m", "to": "2", "plan": LABELLED, **WHO})
        await world.until(controller, "observing")
        labels = [{"request_id": "r1", "label": "7"}, {"request_id": "r2", "label": [1, 0]}]
        assert (await client.post("/v1/feedback", json=labels)).json() == {"accepted": 2}
        one = await client.post("/v1/feedback", json={"request_id": "r3", "label": 3.0})
        assert one.json() == {"accepted": 1}
        first, second = (g.report() for g in world.traffic.fleet)
        everything = [*labels, {"request_id": "r3", "label": 3.0}]
        assert controller.report(first) == {"feedback": everything}
        assert controller.report(first) == {}, "not again at once"
        assert controller.report(second) == {"feedback": everything}
        controller.report({**second, "feedback_joined": ["r1", "r3", "unknown"]})
        world.monotonic += REPEAT_S
        assert controller.report(first) == {"feedback": [labels[1]]}
        world.monotonic += REPEAT_S
        assert controller.report(first) == {}, "twice is enough"
        world.monotonic += WINDOW_S
        controller.report(first)
        assert len(controller.feedback) == 0

    play(world, scenario)


def test_labels_wait_as_long_as_answers_do() -> None:
    feedback = Feedback()
    with pytest.raises(ConflictError, match="no label is waited for"):
        feedback.add({"request_id": "r", "label": 1}, 0.0, 0.0)
    feedback.add({"request_id": "r", "label": 1}, 0.0, WINDOW_S)
    feedback.due("g", WINDOW_S - 1, WINDOW_S)
    assert len(feedback) == 1
    # The rollout is over.
    feedback.due("g", WINDOW_S - 1, 0.0)
    assert len(feedback) == 0


def test_of_too_many_labels_the_oldest_go() -> None:
    feedback = Feedback()
    for start in range(0, MAX_PENDING + MAX_ITEMS, MAX_ITEMS):
        rows = [{"request_id": f"r{n}", "label": 1} for n in range(start, start + MAX_ITEMS)]
        assert feedback.add(rows, 0.0, WINDOW_S) == MAX_ITEMS
    assert len(feedback) == MAX_PENDING
    assert feedback.dropped == MAX_ITEMS
    assert feedback.due("g", 1.0, WINDOW_S)[0]["request_id"] == f"r{MAX_ITEMS}"


def test_labels_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 4 << 20)
    feedback, label = Feedback(), [f"{i:064}" for i in range(1024)]
    tracemalloc.start()
    try:
        for n in range(50):
            row = json.dumps({"request_id": f"r{n}", "label": label})
            feedback.add(json.loads(row), 0.0, WINDOW_S)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.2 * module.MAX_BYTES
    assert 0 < len(feedback) < 50
    assert len(feedback) + feedback.dropped == 50


def test_a_later_label_of_a_request_replaces_the_first() -> None:
    feedback = Feedback()
    both = [{"request_id": "a", "label": 1}, {"request_id": "b", "label": 1}]
    feedback.add(both, 0.0, WINDOW_S)
    feedback.due("g", 0.0, WINDOW_S)
    feedback.add({"request_id": "a", "label": 2}, 1.0, WINDOW_S)
    assert feedback.due("g", 1.0, WINDOW_S) == [{"request_id": "a", "label": 2}]


@pytest.mark.parametrize(
    "row",
    [
        None,
        "r1",
        {"request_id": "", "label": 1},
        {"request_id": "r" * 129, "label": 1},
        {"request_id": 7, "label": 1},
        {"request_id": "r"},
        {"request_id": "r", "label": None},
        {"request_id": "r", "label": {}},
        {"request_id": "r", "label": []},
        {"request_id": "r", "label": [[1]]},
        {"request_id": "r", "label": float("nan")},
        {"request_id": "r", "label": "cat"},
        {"request_id": "r", "label": 3.5},
        {"request_id": "r", "label": [1, "cat"]},
        {"request_id": "r", "label": "1" * 65},
        {"request_id": "r", "label": 1 << 63},
        {"request_id": "r", "label": 1, "model": "m"},
    ],
)
def test_a_malformed_label_is_refused_with_all_others(row: Any) -> None:
    feedback = Feedback()
    with pytest.raises(InvalidRequest, match="label 1"):
        feedback.add([{"request_id": "good", "label": 1}, row], 0.0, WINDOW_S)
    assert len(feedback) == 0


# The loops, in real time.


def test_a_breaker_is_acted_on_within_a_quarter_of_a_second(world: RolloutWorld) -> None:
    """From a gateway's report to the table without weight at a gateway that waits for it."""

    async def scenario() -> float:
        controller = await world.observing()
        # The gateways have the table with the step's weight.
        await world.second(controller)
        world.traffic.versions["2"] = Version(failing=1.0)
        for gateway in world.traffic.fleet:
            gateway.serve(200, world.traffic.versions)
            gateway.splits["m:1"].update(breaker="open", opened=1)
        loop = asyncio.get_running_loop()
        await controller.start()
        world.announce(controller)
        world.monotonic += 0.05
        for gateway in world.traffic.fleet:
            controller.report(gateway.report())
        began, revision = loop.time(), controller.board.revision
        while True:
            table = await controller.poll_routes(revision, 5.0)
            assert table is not None
            revision = table["revision"]
            if table["models"][0]["split"]["weight"] == 0.0:
                break
        passed = loop.time() - began
        await controller.stop()
        return passed

    assert asyncio.run(scenario()) < 0.25
