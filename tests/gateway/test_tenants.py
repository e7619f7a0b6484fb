"""Whose a request is, what it is charged to, and what happens when a budget is spent."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serving.gateway.tenants import Tenants
from serving.tenant_settings import TenantsConfig
from tests.gateway.client import Client, Reply, body, chunked, get, head, infer
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import GIVES_NAN, ScriptedBackend
from tests.gateway.rollouts import Rollout

A_KEY, NEW_A_KEY, B_KEY = "key-of-a", "new-key-of-a", "key-of-b"
HASHES = {key: hashlib.sha256(key.encode()).hexdigest() for key in (A_KEY, NEW_A_KEY, B_KEY)}
KEYS = {"a": [HASHES[A_KEY], HASHES[NEW_A_KEY]], "b": [HASHES[B_KEY]]}

Serve = Callable[..., Gateway]


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Serve]:
    """A gateway with these settings of tenants, in front of a scripted model m."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Gateway:
            gateway = stack.enter_context(Gateway(tenants=TenantsConfig(**settings)))
            replica = Replica(ScriptedBackend(), run_dir)
            stack.callback(replica.stop)
            stack.callback(replica.backend.gate.set)
            gateway.publish(arm("m", [replica]))
            gateway.backend = replica.backend  # type: ignore[attr-defined]
            return gateway

        yield start


def ask(gateway: Gateway, *headers: str) -> Reply:
    with gateway.connect() as client:
        return client.ask(infer("m", 1, headers=headers))


def charged(gateway: Gateway) -> dict[tuple[str, str], int]:
    """Requests by tenant and kind."""
    return {
        (tenant, kind): requests
        for entry in gateway.run(gateway.server.report)["usage"]
        for tenant, kind, _, requests in entry["rows"]
    }


def test_a_key_says_whose_a_request_is(serve: Serve) -> None:
    gateway = serve(keys=KEYS)
    for header in (
        f"Authorization: Bearer {A_KEY}",
        f"authorization: bearer {NEW_A_KEY}",
        f"X-API-Key: {A_KEY}",
        f"x-api-key: {B_KEY} ",
    ):
        assert ask(gateway, header).values == [2.0, 2.0]
    assert ask(gateway).status == 200
    # Another scheme is no key: it is for somebody on the way here.
    assert ask(gateway, "Authorization: Basic abc").status == 200
    counts = {("a", "direct"): 3, ("b", "direct"): 1, ("default", "direct"): 2}
    assert charged(gateway) == counts


def test_a_wrong_key_is_refused(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    gateway = serve(keys=KEYS, header="x-tenant")
    with caplog.at_level(logging.DEBUG):
        for headers, message in (
            (["x-api-key: wrong-key"], "the API key is not known"),
            (["Authorization: Bearer "], "the API key is not known"),
            ([f"x-api-key: {HASHES[A_KEY]}"], "the API key is not known"),
            ([f"x-api-key: {A_KEY}", f"Authorization: Bearer {B_KEY}"], "several API keys"),
        ):
            reply = ask(gateway, *headers)
            assert reply.status == 401
            assert message in reply.error
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "wrong-key" not in reply.error
    assert "wrong-key" not in caplog.text
    assert gateway.outcomes("m") == {"unauthenticated": 4}
    assert gateway.backend.seen == []  # type: ignore[attr-defined]


def test_a_key_is_needed_where_it_is_required(serve: Serve) -> None:
    gateway = serve(keys=KEYS, require_key=True)
    reply = ask(gateway)
    assert reply.status == 401
    assert "Authorization: Bearer KEY, or x-api-key: KEY" in reply.error
    assert ask(gateway, f"x-api-key: {B_KEY}").status == 200
    with gateway.connect() as client:
        assert client.ask(get("/v2/models/m")).status == 200
        assert client.ask(get("/v2/health/ready")).status == 200


def test_a_body_without_a_key_is_not_waited_for(serve: Serve) -> None:
    gateway = serve(keys=KEYS, require_key=True)
    with gateway.connect() as client:
        reply = client.ask(head("POST", "/v2/models/m/infer", "Content-Length: 1000000"))
        assert reply.status == 401
        assert reply.headers["connection"] == "close"


def test_no_client_chooses_the_tenant_of_a_key(serve: Serve) -> None:
    gateway = serve(keys=KEYS, header="x-tenant")
    reply = ask(gateway, "x-tenant: a")
    assert (reply.status, "tenant 'a' has keys" in reply.error) == (401, True)
    reply = ask(gateway, "x-tenant: a", f"x-api-key: {B_KEY}")
    assert (reply.status, "the key is of tenant 'b'" in reply.error) == (403, True)
    assert ask(gateway, "x-tenant: b", f"x-api-key: {B_KEY}").status == 200
    assert ask(gateway, "x-tenant: c").status == 200
    assert charged(gateway) == {("b", "direct"): 1, ("c", "direct"): 1}


def test_known_heads_keep_their_tenant(serve: Serve) -> None:
    """What a connection repeats is not parsed again, and what differs is not taken for it."""
    gateway = serve(keys=KEYS)
    with gateway.connect() as client:
        for key in (A_KEY, A_KEY, B_KEY, B_KEY, A_KEY):
            assert client.ask(infer("m", 1, headers=[f"x-api-key: {key}"])).status == 200
    assert charged(gateway) == {("a", "direct"): 3, ("b", "direct"): 2}


def test_a_header_names_the_tenant(serve: Serve) -> None:
    gateway = serve(header="X-Tenant", default="nobody", budgets={"listed": None}, max_unlisted=2)
    for name in ("one", "two", "one", "listed"):
        assert ask(gateway, f"x-tenant: {name}").status == 200
    assert ask(gateway).status == 200
    with gateway.connect() as client:
        trailer = chunked("/v2/models/m/infer", [body(1)], trailers=b"x-tenant: listed\r\n")
        assert client.ask(trailer).status == 200
    direct = {"one": 2, "two": 1, "listed": 1, "nobody": 2}
    assert charged(gateway) == {(name, "direct"): n for name, n in direct.items()}
    reply = ask(gateway, "x-tenant: three")
    assert reply.status == 403
    assert "all 2 that it may" in reply.error
    for bad in ("a/b", "-a", "a" * 65, "ä"):
        reply = ask(gateway, f"x-tenant: {bad}")
        assert (reply.status, "1 to 64 letters" in reply.error) == (400, True)
    reply = ask(gateway, "x-tenant: one", "x-tenant: two")
    assert (reply.status, "several values" in reply.error) == (400, True)
    assert gateway.outcomes("m") == {"success": 6, "forbidden": 1, "invalid_request": 5}


def test_a_batch_is_charged_to_each_of_its_tenants(serve: Serve) -> None:
    gateway = serve(header="x-tenant")
    gate = gateway.backend.gate  # type: ignore[attr-defined]
    gate.clear()
    with ExitStack() as stack:

        def send(tenant: str, *rows: float) -> Client:
            client = stack.enter_context(gateway.connect())
            return client.send(infer("m", *rows, headers=[f"x-tenant: {tenant}"]))

        def depth() -> int:
            return gateway.batcher("m").queue_depth

        # Connections are taken by runs that cannot end; what comes then waits, and goes together.
        first: list[Client] = []
        while not gateway.run(depth):
            seen = gateway.run(lambda: gateway.batcher("m").in_flight)
            first.append(send("first", 1.0))
            gateway.until(
                lambda seen=seen: depth() or gateway.batcher("m").in_flight > seen, "it is there"
            )
        waiting = gateway.run(depth)
        later = [send("a", 1.0, 2.0), send("b", 3.0), send("a", 4.0), send("b", GIVES_NAN)]
        gateway.until(lambda: depth() == waiting + 5, "they wait")
        gate.set()
        assert [c.reply().status for c in later] == [200, 200, 200, 400]
        assert {c.reply().status for c in first} == {200}
    counts = charged(gateway)
    assert counts.pop(("first", "direct")) == len(first)
    assert counts == {("a", "direct"): 2, ("b", "direct"): 1, ("b", "failed"): 1}
    report = gateway.run(gateway.server.report)["usage"]
    [replica] = {entry["replica"] for entry in report}
    shares = {(t, k): ns for entry in report for t, k, ns, _ in entry["rows"]}
    assert shares["a", "direct"] == pytest.approx(3 * shares["b", "direct"], abs=2)
    assert shares["b", "failed"] == pytest.approx(shares["b", "direct"], abs=2)
    assert replica == "r1"


def test_what_a_canary_hands_over_stays_its_tenants(run_dir: Path) -> None:
    with ExitStack() as stack:
        gateway = stack.enter_context(Gateway(tenants=TenantsConfig(header="x-tenant")))
        replicas = [Replica(ScriptedBackend(), run_dir, name) for name in ("stable-1", "canary-1")]
        for replica in replicas:
            stack.callback(replica.stop)
        rollout = Rollout(gateway, *replicas)
        rollout.begin(weight=1.0)
        replicas[1].backend.failure = RuntimeError("broken")
        with gateway.connect() as client:
            assert client.ask(infer("m", 1, headers=["x-tenant: a"])).status == 200
        assert charged(gateway) == {("a", "direct"): 1}


SPENT = {"a": {"budget": 5.0, "spent": 5.25, "until": 86_400.0 * 40_000}}


def tell(gateway: Gateway, spent: dict[str, Any]) -> None:
    """The controller answers the next report with this."""
    said = len(gateway.controller.reports)
    gateway.controller.answer = {"spent": spent}
    gateway.run(gateway.server._report_now.set)
    eventually(lambda: len(gateway.controller.reports) > said, "a report")
    tenants = gateway.server.front.tenants
    gateway.until(lambda: tenants is not None and tenants._spent == spent, "it is heard")


def test_a_spent_budget_is_answered_429(serve: Serve) -> None:
    gateway = serve(header="x-tenant", budgets={"a": 5.0})
    with gateway.connect() as client:
        request = infer("m", 1, headers=["x-tenant: a"])
        assert client.ask(request).status == 200
        tell(gateway, SPENT)
        reply = client.ask(request)
        assert reply.status == 429
        assert reply.error == (
            "tenant 'a' has spent its budget of the day: $5.25 of $5; "
            "it renews at 2079-07-08T00:00:00Z"
        )
        left = SPENT["a"]["until"] - time.time()
        assert float(reply.headers["retry-after"]) == pytest.approx(left, abs=20)
        # The connection stays, others are answered, and so is the tenant when it may spend again.
        assert client.ask(infer("m", 1, headers=["x-tenant: b"])).status == 200
        assert client.ask(request).status == 429
        gateway.controller.away = True
        assert client.ask(request).status == 429
        gateway.controller.away = False
        tell(gateway, {})
        assert client.ask(request).status == 200
    assert gateway.outcomes("m") == {"success": 3, "budget_spent": 3}


def test_a_budget_renews_at_midnight_without_being_told() -> None:
    clock = [86_400.0 - 0.5]
    tenants = Tenants(TenantsConfig(header="x-tenant", budgets={"a": 1.0}), lambda: clock[0])
    tenants.spent({"a": {"budget": 1.0, "spent": 1.0, "until": 86_400}})
    with pytest.raises(Exception, match=r"\$1 of \$1; it renews at 1970-01-02T00:00:00Z") as found:
        tenants.check_budget("a")
    assert found.value.retry_after_s == 1  # type: ignore[attr-defined]
    clock[0] = 86_400.0
    tenants.check_budget("a")


def test_one_budget_for_all_needs_no_header(serve: Serve) -> None:
    gateway = serve(budgets={"default": 5.0})
    assert ask(gateway).status == 200
    tell(gateway, {"default": SPENT["a"]})
    assert ask(gateway).status == 429
    assert charged(gateway) == {("default", "direct"): 1}
