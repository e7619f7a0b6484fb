"""The admin API: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.control.admin import create_app
from serving.control.bodies import MAX_BODY
from tests.control.world import World, gateway_report, model_row

Call = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def ask(world: World, call: Call, host: str = "127.0.0.1") -> httpx.Response:
    async def scenario() -> httpx.Response:
        controller = await world.controller()
        app = create_app(controller, host=host, ray_version="2.60")
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8002") as c:
            return await call(c)

    return asyncio.run(scenario())


def apply_body(world: World, models: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"config": world.config(models).model_dump(mode="json"), **more}


def error_of(reply: httpx.Response) -> tuple[int, str]:
    body = reply.json()
    assert set(body) == {"error", "slug"}
    assert "\n" not in body["error"]
    return reply.status_code, body["slug"]


def test_an_apply_answers_with_the_plan(world: World) -> None:
    body = apply_body(world, {"m": {"version": "2"}})
    reply = ask(world, lambda c: c.post("/v1/apply", json=body))
    assert reply.status_code == 200
    (change,) = reply.json()["changes"]
    assert (change["change"], change["model"], change["version"]) == ("start", "m", "2")


def test_errors_have_a_sentence_a_slug_and_a_status(world: World) -> None:
    unknown = apply_body(world, {"m": {"version": "9"}})
    assert error_of(ask(world, lambda c: c.post("/v1/apply", json=unknown))) == (502, "registry")
    bad_key = {"config": {"modles": {}}}
    reply = ask(world, lambda c: c.post("/v1/apply", json=bad_key))
    assert error_of(reply) == (400, "config")
    assert "unknown key 'modles'" in reply.json()["error"]
    assert error_of(ask(world, lambda c: c.get("/v1/nothing"))) == (404, "not_found")
    assert error_of(ask(world, lambda c: c.get("/v1/apply"))) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"config": []}',
        b'{"config": {}, "dry_run": "yes"}',
        b'{"config": {}, "force": true}',
        b'{"config": ' + b"[" * 100_000,
        b"\xff\xfe",
        b" " * (MAX_BODY + 1),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_malformed_body_is_refused(world: World, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = ask(world, lambda c: c.post("/v1/apply", content=content, headers=headers))
    assert error_of(reply) == (400, "invalid_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_foreign_web_page_could_post_is_refused(world: World, kind: str) -> None:
    content = json.dumps(apply_body(world, {})).encode()
    headers = {"content-type": kind}
    reply = ask(world, lambda c: c.post("/v1/apply", content=content, headers=headers))
    assert error_of(reply) == (400, "invalid_request")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8002", "10.0.0.7:8002", ""])
def test_a_foreign_host_header_is_refused_on_loopback(world: World, host: str) -> None:
    reply = ask(world, lambda c: c.get("/v1/status", headers={"host": host}))
    assert error_of(reply) == (400, "invalid_request")


@pytest.mark.parametrize("host", ["127.0.0.1:8002", "localhost:8002", "localhost", "[::1]:8002"])
def test_loopback_host_headers_are_taken(world: World, host: str) -> None:
    assert ask(world, lambda c: c.get("/v1/status", headers={"host": host})).status_code == 200


def test_any_host_header_is_taken_where_it_listens_for_others(world: World) -> None:
    headers = {"host": "gateway.example"}
    reply = ask(world, lambda c: c.get("/v1/status", headers=headers), host="0.0.0.0")
    assert reply.status_code == 200


def test_health_tells_whether_the_loop_runs(world: World) -> None:
    assert ask(world, lambda c: c.get("/healthz")).status_code == 503

    async def running() -> bool:
        controller = await world.controller()
        await controller.start()
        alive = controller.alive
        await controller.stop()
        return alive

    assert asyncio.run(running())


def test_an_unknown_failure_is_opaque(world: World) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise ZeroDivisionError("secret")

    world.resolver.resolve = broken  # type: ignore[method-assign]
    body = apply_body(world, {"m": {"version": "1"}})
    reply = ask(world, lambda c: c.post("/v1/apply", json=body))
    assert error_of(reply) == (500, "internal")
    assert "secret" not in reply.text


def test_routes_are_the_published_table(world: World) -> None:
    empty = {"revision": 0, "complete": False, "models": []}
    assert ask(world, lambda c: c.get("/v1/routes")).json() == empty


def test_counters_never_go_back_when_the_controller_restarts(world: World) -> None:
    """Its store is a tick behind: it shows no counts until the gateways have repeated theirs."""

    async def scrape(app: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8002") as c:
            return await c.get("/metrics")

    async def scenario() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        first = await world.controller()
        await world.apply(first, {"m": {"version": "1"}})
        first.report(gateway_report("g1", 1, [model_row("1", 5)]))
        await first.step(look=True)
        again = await world.controller()
        app = create_app(again, host="127.0.0.1", ray_version="2.60")
        early = await scrape(app)
        again.report(gateway_report("g1", 1, [model_row("1", 7)]))
        heard = await scrape(app)
        lost = await world.controller()
        world.monotonic += 30.0
        late = await scrape(create_app(lost, host="127.0.0.1", ray_version="2.60"))
        return early, heard, late

    early, heard, late = asyncio.run(scenario())
    assert error_of(early) == (503, "unavailable")
    assert 'serving_requests_total{model="m",outcome="success",version="1"} 7.0' in heard.text
    assert late.status_code == 200, "a gateway that never comes back is not waited for"
