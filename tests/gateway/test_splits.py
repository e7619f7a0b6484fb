"""A model's requests, divided between its stable version and a canary."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from serving.core.assignment import unit_point
from tests.gateway.client import Client, body, infer, post
from tests.gateway.harness import arm, eventually
from tests.gateway.rollouts import ROLLOUT, SALT, Rollout, answered_by, arm_of
from tests.gateway.test_batches import callers

IDS = [f"request-{i}" for i in range(400)]


def by_id(client: Client, request_id: str) -> str:
    reply = client.ask(infer("m", 1, headers=[f"X-Request-Id: {request_id}"]))
    assert reply.headers["x-request-id"] == request_id
    return answered_by(reply)


def canaries(client: Client) -> set[str]:
    return {i for i in IDS if by_id(client, i) == "canary"}


def test_the_canary_gets_its_share(rollout: Rollout) -> None:
    rollout.begin(0.3)
    with rollout.gateway.connect() as client:
        chosen = canaries(client)
    # Which they are is fixed by salt and ids.
    expected = {i for i in IDS if unit_point(SALT.encode(), i.encode()) < 0.3}
    assert chosen == expected
    deviation = math.sqrt(len(IDS) * 0.3 * 0.7)
    assert abs(len(chosen) - 0.3 * len(IDS)) < 4 * deviation
    counts = rollout.counts()
    assert counts.arm("canary").requests == len(chosen)
    assert counts.arm("stable").requests == len(IDS) - len(chosen)
    assert set(counts.canary) == {"canary-1"}
    assert set(counts.stable) == {"stable-1"}


def test_requests_without_an_id_are_drawn_one_by_one(rollout: Rollout) -> None:
    rollout.begin(0.5)
    with rollout.gateway.connect() as client:
        arms = [arm_of(client) for _ in range(200)]
    # One time in 10^11 it is not so.
    assert abs(arms.count("canary") - 100) < 48


def test_nobody_leaves_the_canary_when_its_weight_grows(rollout: Rollout) -> None:
    before: set[str] = set()
    with rollout.gateway.connect() as client:
        for epoch, weight in enumerate((0.0, 0.1, 0.4, 1.0)):
            rollout.begin(weight, epoch)
            chosen = canaries(client)
            assert before <= chosen
            before = chosen
            assert rollout.canary_counts(epoch).requests == len(chosen)
    assert before == set(IDS)


@pytest.mark.parametrize(
    ("unit", "header"),
    [
        ("header:X-User", "x-user: {}"),
        ("cookie:user", "Cookie: theme={{dark}}; a:b=1; user={}; last=1"),
        ("cookie:user", 'Cookie: user="{}"'),
    ],
)
def test_a_user_stays_with_an_arm(rollout: Rollout, unit: str, header: str) -> None:
    rollout.begin(0.5, unit=unit)
    for user in range(12):
        expected = "canary" if unit_point(SALT.encode(), b"%d" % user) < 0.5 else "stable"
        with rollout.gateway.connect() as client:
            arms = {arm_of(client, header.format(user)) for _ in range(3)}
        assert arms == {expected}


def test_a_parameter_decides(rollout: Rollout) -> None:
    rollout.begin(0.5, unit="parameter:user")
    with rollout.gateway.connect() as client:
        for user in range(12):
            expected = "canary" if unit_point(SALT.encode(), b"%d" % user) < 0.5 else "stable"
            assert {arm_of(client, parameters={"user": user}) for _ in range(3)} == {expected}


@pytest.mark.parametrize(
    "unit", ["header:x-user", "cookie:user", "parameter:user"], ids=["header", "cookie", "body"]
)
def test_who_does_not_say_who_he_is_is_drawn(rollout: Rollout, unit: str) -> None:
    rollout.begin(0.5, unit=unit)
    with rollout.gateway.connect() as client:
        arms = {arm_of(client, "Cookie: other=1; user") for _ in range(60)}
    assert arms == {"canary", "stable"}


@pytest.mark.parametrize(
    ("unit", "empty"),
    [
        ("header:x-user", {"headers": ["X-User:"]}),
        ("cookie:user", {"headers": ["Cookie: user=; a=b"]}),
        ("parameter:user", {"parameters": {"user": ""}}),
    ],
    ids=["header", "cookie", "body"],
)
def test_an_empty_value_is_nobody(rollout: Rollout, unit: str, empty: dict[str, Any]) -> None:
    rollout.begin(0.5, unit=unit)
    with rollout.gateway.connect() as client:
        arms = {answered_by(client.ask(infer("m", 1, **empty))) for _ in range(60)}
    assert arms == {"canary", "stable"}


def test_cookies_may_come_in_several_headers(rollout: Rollout) -> None:
    rollout.begin(0.5, unit="cookie:user")
    with rollout.gateway.connect() as client:
        for user in range(12):
            expected = "canary" if unit_point(SALT.encode(), b"%d" % user) < 0.5 else "stable"
            assert arm_of(client, f"Cookie: user={user}", "Cookie: theme=dark") == expected
            assert arm_of(client, "Cookie: theme=dark", f"Cookie: user={user}") == expected


def test_testers_choose_their_arm_and_are_not_analysed(rollout: Rollout) -> None:
    overrides = (("x-canary", "always", "canary"), ("x-canary", "never", "stable"))
    rollout.begin(0.5, overrides=overrides)
    with rollout.gateway.connect() as client:
        assert {arm_of(client, "X-Canary: always") for _ in range(10)} == {"canary"}
        assert {arm_of(client, "X-Canary: never") for _ in range(10)} == {"stable"}
        assert rollout.report()["trials"] == []
        assert {arm_of(client, "X-Canary: perhaps") for _ in range(60)} == {"canary", "stable"}
    assert rollout.summary()["overridden"] == 20


def test_a_version_that_is_named_is_not_analysed(rollout: Rollout) -> None:
    rollout.begin(1.0)
    with rollout.gateway.connect() as client:
        for version, role in (("1", "stable"), ("2", "canary")):
            reply = client.ask(post(f"/v2/models/m/versions/{version}/infer", body(1)))
            assert answered_by(reply) == role
    assert rollout.report()["trials"] == []


def test_a_canary_without_replicas_gets_nothing(rollout: Rollout) -> None:
    rollout.canaries = []
    rollout.begin(1.0)
    with rollout.gateway.connect() as client:
        assert arm_of(client) == "stable"
        assert rollout.summary()["diverted"] == 1
        assert rollout.report()["trials"] == []
        # Stable has all of the time for it.
        rollout.stable.backend.gate.clear()
        started = time.monotonic()
        assert client.ask(infer("m", 1, headers=["X-Request-Timeout-Ms: 300"])).status == 504
        assert time.monotonic() - started > 0.29
        rollout.stable.backend.gate.set()
        rollout.canaries = [rollout.canary]
        rollout.begin(1.0)
        assert arm_of(client) == "canary"


def test_a_canary_without_room_gets_nothing(rollout: Rollout) -> None:
    rollout.limits = {"queue_max_rows": 1}
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    gateway = rollout.gateway
    batcher = gateway.batcher("m", "2")
    with callers(gateway, 3) as clients, gateway.connect() as other:
        for i, client in enumerate(clients):
            client.send(infer("m", 10 + i))
            gateway.until(lambda n=i + 1: batcher.in_flight + batcher.queue_depth == n)
        assert gateway.run(lambda: batcher.queue_depth) == 1
        assert arm_of(other) == "stable"
        assert rollout.summary()["diverted"] == 1
        rollout.canary.backend.gate.set()
        assert [answered_by(c.reply()) for c in clients] == ["canary"] * 3
    assert gateway.outcomes("m", "2") == {"success": 3}
    assert rollout.counts().stable == {}


def test_a_canary_that_could_not_answer_in_its_part_of_the_time_gets_nothing(
    rollout: Rollout,
) -> None:
    rollout.limits = {"queue_max_wait_s": 60.0}
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    gateway = rollout.gateway
    batcher = gateway.batcher("m", "2")
    gateway.run(lambda: batcher._service.observe(1, 4.0))
    with callers(gateway, 3) as clients, gateway.connect() as other:
        for i, client in enumerate(clients):
            client.send(infer("m", i))
            gateway.until(lambda n=i + 1: batcher.in_flight + batcher.queue_depth == n)
        # One row waits, which takes 4 s: within the client's time, and beyond the canary's.
        assert arm_of(other, "X-Request-Timeout-Ms: 6000") == "stable"
        assert rollout.summary()["diverted"] == 1
        rollout.canary.backend.gate.set()
        assert [answered_by(c.reply()) for c in clients] == ["canary"] * 3


def test_a_batch_is_counted_once(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 8, "max_delay_s": 60.0}
    rollout.begin(1.0)
    with callers(rollout.gateway, 8) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", i))
        assert [answered_by(c.reply()) for c in clients] == ["canary"] * 8
    counts = rollout.canary_counts()
    assert (counts.requests, counts.batches) == (8, 1)
    assert (counts.latency.total, counts.batch_latency.total) == (8, 1)
    assert counts.batch_latency.quantile(1.0) == counts.latency.quantile(1.0)
    # What it took of the device is what the ledger is told.
    usage = rollout.gateway.run(rollout.gateway.server.routes.report_usage)
    [(_, kind, busy_ns, requests)] = next(u["rows"] for u in usage if u["replica"] == "canary-1")
    assert (kind, requests, counts.busy_ns) == ("direct", 8, busy_ns)
    assert busy_ns > 0


def test_late_answers_count_in_the_epoch_of_their_request(rollout: Rollout) -> None:
    rollout.begin(1.0, epoch=1)
    rollout.canary.backend.gate.clear()
    with callers(rollout.gateway, 2) as (first, second):
        first.send(infer("m", 1))
        eventually(lambda: rollout.canary.backend.running)
        rollout.begin(1.0, epoch=2)
        second.send(infer("m", 2))
        rollout.gateway.until(lambda: rollout.gateway.batcher("m", "2").in_flight == 2)
        rollout.canary.backend.gate.set()
        assert answered_by(first.reply()) == answered_by(second.reply()) == "canary"
    assert rollout.canary_counts(1).requests == 1
    assert rollout.canary_counts(2).requests == 1


@pytest.mark.parametrize("version", ["1", "2"], ids=["rolled back", "promoted"])
def test_requests_in_flight_when_the_rollout_ends(rollout: Rollout, version: str) -> None:
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    with rollout.gateway.connect() as client, rollout.gateway.connect() as other:
        client.send(infer("m", 1))
        eventually(lambda: rollout.canary.backend.running)
        rollout.end(version)
        if version == "1":
            assert arm_of(other) == "stable"
        rollout.canary.backend.gate.set()
        assert client.reply().headers["x-model-version"] == "2"
    assert rollout.canary_counts().requests == 1
    assert rollout.summary()["rollout"] == ROLLOUT


def test_a_split_without_its_canary_is_none(rollout: Rollout) -> None:
    """Not even one that an earlier table had."""
    rollout.begin(1.0)
    gateway, stable = rollout.gateway, rollout.stable
    with gateway.connect() as client:
        assert arm_of(client) == "canary"
        split = gateway.controller.table.models["m"].split
        gateway.publish(arm("m", [stable], version="1"), split=split)
        assert arm_of(client) == "stable"


def test_known_heads_when_a_table_asks_for_other_headers(rollout: Rollout) -> None:
    users = {"canary": "", "stable": ""}
    for user in ("u-1", "u-2", "u-3", "u-4", "u-5", "u-6"):
        arm_name = "canary" if unit_point(SALT.encode(), user.encode()) < 0.5 else "stable"
        users[arm_name] = user
    requests = {a: infer("m", 1, headers=[f"X-User: {u}"]) for a, u in users.items()}
    with callers(rollout.gateway, 2) as clients:
        asked = list(zip(users, clients, strict=True))
        rollout.end()
        for name, client in asked:
            assert answered_by(client.ask(requests[name])) == "stable"
        rollout.begin(0.5, unit="header:x-user")
        for name, client in asked * 3:
            assert answered_by(client.ask(requests[name])) == name
        rollout.begin(0.5, unit="header:x-user", overrides=(("x-user", users["stable"], "canary"),))
        for _, client in asked * 2:
            assert answered_by(client.ask(requests["stable"])) == "canary"
        rollout.end()
        for name, client in asked:
            assert answered_by(client.ask(requests[name])) == "stable"


def test_a_client_that_leaves_is_in_no_count(rollout: Rollout) -> None:
    rollout.begin(1.0)
    rollout.canary.backend.gate.clear()
    with rollout.gateway.connect() as client:
        client.send(infer("m", 1))
        eventually(lambda: rollout.canary.backend.running)
        client.reset()
        eventually(lambda: rollout.gateway.outcomes("m", "2") == {"cancelled": 1})
    rollout.canary.backend.gate.set()
    rollout.gateway.until(lambda: not rollout.gateway.batcher("m", "2").in_flight)
    assert rollout.report()["trials"] == []
