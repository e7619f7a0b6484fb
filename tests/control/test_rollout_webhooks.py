"""Rollouts whose plan asks real web services: what a refusal does, and what of a URL is shown."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.control.admin import create_app
from serving.control.controller import Controller
from serving.control.providers import Providers
from tests.control.rollout_world import QUICK, RolloutWorld, weight
from tests.control.web_service import Received, Reply, WebService, verdict

SECRET = "hunter2"
PROMETHEUS_SAYS_ZERO = (
    b'{"status": "success", "data": {"resultType": "scalar", "result": [0, "0"]}}'
)
SLOW = {"min_units": 8, "on_insufficient_data": {"after": "1d", "action": "pause"}}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[RolloutWorld]:
    world = RolloutWorld(tmp_path)
    providers = Providers(lambda: 7, retry_after_s=())
    world.providers = providers  # type: ignore[assignment]
    yield world
    providers.close(0)


def gated(url: str, **more: Any) -> dict[str, Any]:
    gate = {"type": "webhook", "url": url, "timeout": "10d", "on_timeout": "proceed"}
    steps = [{"weight": 20, "hold": 3, "gate": gate}, {"weight": 50, "hold": 3}]
    return {**QUICK, "steps": steps, "analysis": SLOW, **more}


def test_a_gate_that_says_no_is_obeyed_at_its_first_word(
    world: RolloutWorld, service: WebService
) -> None:
    answers = iter(["unknown", "unknown", "fail"])
    service.answer = lambda _: verdict(next(answers), message="load test failed")

    async def scenario() -> None:
        controller = await world.serving()
        await world.change(controller, "2", rollout=gated(service.url))
        await world.until(controller, "awaiting_gate")
        assert weight(controller) == 0.2
        record = await world.until(controller, "rolling_back", at_most=1000)
        assert weight(controller) == 0.0
        assert record.rollout.reason == (
            f"the gate of step 1 refused: {service.url} says fail: load test failed"
        )
        # Two times it was not sure, and was asked again.
        assert service.received.qsize() == 3
        await world.until(controller, "rolled_back")

    asyncio.run(scenario())


@pytest.mark.parametrize("reply", [Reply(500, b'{"verdict": "fail"}'), verdict("unknown")])
def test_a_gate_that_says_nothing_clear_neither_passes_nor_takes_back(
    world: RolloutWorld, service: WebService, reply: Reply
) -> None:
    service.answer = lambda _: reply

    async def scenario() -> None:
        controller = await world.serving()
        await world.change(controller, "2", rollout=gated(service.url))
        await world.until(controller, "awaiting_gate")
        for _ in range(1000):
            if service.received.qsize() >= 3:
                break
            await world.second(controller)
        assert (await controller.rollouts.find("m")).rollout.state == "awaiting_gate"
        assert weight(controller) == 0.2

    asyncio.run(scenario())


def test_what_a_url_hides_is_shown_nowhere(
    world: RolloutWorld, service: WebService, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole rollout with a web service at every place that may have one."""
    url = f"{service.url}/hooks/{SECRET}?token={SECRET}"
    asked: dict[str, int] = {}

    def answer(request: Received) -> Reply:
        if request.method == "GET":
            return Reply(body=PROMETHEUS_SAYS_ZERO)
        document = request.document
        event, subject = document["event"], document["subject"]
        assert SECRET not in json.dumps(document)
        asked[subject] = asked.get(subject, 0) + 1
        if event in ("event", "post-rollout"):
            return Reply(503)
        if event == "gate":
            return verdict("fail")
        # Long enough for somebody to read what is waited for.
        return verdict("ok") if asked[subject] > 1 else Reply(502)

    service.answer = answer
    triggers = {
        "load": {"kind": "webhook", "url": url, "interval": 1},
        "query": {"kind": "promql", "url": url, "query": "up", "threshold": 1, "interval": 1},
    }
    events = ("pre-rollout", "pre-step", "event", "post-rollout")
    plan = gated(
        url,
        webhooks=[{"event": event, "url": url} for event in events],
        analysis={**SLOW, "triggers": triggers},
    )
    seen: list[str] = []
    states: list[str] = []

    async def scenario() -> None:
        controller = await world.serving()
        app = create_app(controller, host="127.0.0.1", ray_version="2.60")
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8002") as c:
            body = {"model": "m", "to": "2", "plan": plan}
            seen.append((await c.post("/v1/rollouts/plan", json=body)).text)
            seen.append((await c.post("/v1/rollouts", json=body)).text)
            for _ in range(2000):
                await world.second(controller)
                await look(controller, c)
                if states[-1] == "rolled_back":
                    break
            raw = (await c.get("/v1/rollouts/m")).json()
        spec = raw["spec"]
        asking = [t for t in spec["analysis"]["triggers"] if t["name"] in triggers]
        sources = [spec["steps"][0]["gate"], *spec["webhooks"], *asking]
        assert [source["url"] for source in sources] == [service.url] * 7

    async def look(controller: Controller, client: httpx.AsyncClient) -> None:
        paths = ("/v1/rollouts/m", "/v1/rollouts", "/v1/status", "/v1/audit", "/metrics")
        seen.extend([(await client.get(path)).text for path in paths])
        states.append((await controller.rollouts.find("m")).rollout.state)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())
        world.providers.close(20.0)
    assert {"pending", "shadowing", "awaiting_gate", "rolled_back"} <= set(states)
    shown = "\n".join(seen)
    for event in ("pre-rollout", "pre-step"):
        assert f"the {event} webhook at {service.url}" in shown
    assert f"when {service.url} says yes" in shown
    audited = [row.to_dict() for row in world.store.audit(after=0, limit=1000)]
    assert f"{service.url} says fail" in json.dumps(audited)
    assert f"a notice to {service.url} was given up" in caplog.text
    told = [shown, json.dumps(audited), str(world.store.events(limit=1000)), caplog.text]
    assert [text for text in told if SECRET in text] == []
