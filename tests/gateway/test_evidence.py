"""What is evidence: requests that either arm could take, whichever they were drawn for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from serving.core.assignment import unit_point
from serving.gateway import breaker
from tests.gateway.client import Client, infer
from tests.gateway.harness import Gateway, eventually
from tests.gateway.rollouts import SALT, Rollout, answered_by, arm_of
from tests.gateway.test_batches import callers
from tests.gateway.test_draws import accepted, ask_at_once, one_turn
from tests.gateway.test_shield import fails

IDS = [f"request-{i}" for i in range(2000)]


def drawn_for(arm: str, weight: float = 0.5) -> list[str]:
    """Ids of requests that are drawn for an arm."""
    canary = [i for i in IDS if unit_point(SALT.encode(), i.encode()) < weight]
    return canary if arm == "canary" else [i for i in IDS if i not in canary]


def ask(client: Client, ids: Sequence[str]) -> list[str]:
    return [arm_of(client, f"X-Request-Id: {i}") for i in ids]


def fill(gateway: Gateway, version: str, clients: Sequence[Client], ids: Sequence[str]) -> None:
    """Let requests of one arm run and wait at it."""
    batcher = gateway.batcher("m", version)
    for n, (client, i) in enumerate(zip(clients, ids, strict=True), 1):
        client.send(infer("m", n, headers=[f"X-Request-Id: {i}"]))
        gateway.until(lambda n=n: batcher.in_flight + batcher.queue_depth == n)


def test_a_gateway_that_does_not_reach_the_canary_counts_neither_arm(rollout: Rollout) -> None:
    rollout.canaries = []
    rollout.begin(0.5)
    with rollout.gateway.connect() as client:
        assert set(ask(client, IDS[:20])) == {"stable"}
    assert rollout.report()["trials"] == []


def test_before_anything_is_drawn_for_the_canary_it_need_not_be_there(rollout: Rollout) -> None:
    rollout.canaries = []
    rollout.begin(0.0)
    with rollout.gateway.connect() as client:
        ask(client, IDS[:3])
    assert rollout.stable_counts().requests == 3


def test_while_the_canary_has_no_room_neither_arm_counts(rollout: Rollout) -> None:
    rollout.canary_limits = {"queue_max_rows": 1}
    rollout.begin(0.5)
    canary, stable = drawn_for("canary"), drawn_for("stable")
    rollout.canary.backend.gate.clear()
    with callers(rollout.gateway, 3) as clients, rollout.gateway.connect() as other:
        fill(rollout.gateway, "2", clients, canary[:3])
        assert set(ask(other, [*canary[3:6], *stable[:4]])) == {"stable"}
        assert rollout.report()["trials"] == []
        rollout.canary.backend.gate.set()
        assert [answered_by(client.reply()) for client in clients] == ["canary"] * 3
        ask(other, stable[4:6])
    assert rollout.summary()["diverted"] == 3
    assert (rollout.canary_counts().requests, rollout.stable_counts().requests) == (3, 2)


def test_while_stable_has_no_room_neither_arm_counts(rollout: Rollout) -> None:
    rollout.limits = {"queue_max_rows": 1}
    rollout.begin(0.5)
    canary, stable = drawn_for("canary"), drawn_for("stable")
    rollout.stable.backend.gate.clear()
    with callers(rollout.gateway, 3) as clients, rollout.gateway.connect() as other:
        fill(rollout.gateway, "1", clients, stable[:3])
        refused = other.ask(infer("m", 1, headers=[f"X-Request-Id: {stable[3]}"]))
        assert refused.status == 429
        assert ask(other, canary[:2]) == ["canary"] * 2
        assert rollout.report()["trials"] == []
        rollout.stable.backend.gate.set()
        assert [answered_by(client.reply()) for client in clients] == ["stable"] * 3


def test_what_of_a_draw_counts_does_not_depend_on_how_it_falls(rollout: Rollout) -> None:
    rollout.canary_limits = {"queue_max_rows": 3}
    with accepted(rollout.gateway, 8) as clients:
        for epoch, weight in enumerate((1.0, 1e-9)):
            rollout.begin(weight, epoch)
            ask_at_once(rollout, clients, range(8))
    assert rollout.canary_counts(0).requests == 3
    assert rollout.stable_counts(0).requests == 0
    assert rollout.stable_counts(1).requests == 3


def test_a_draw_is_let_in_as_far_as_stable_has_room(rollout: Rollout) -> None:
    rollout.limits, rollout.canary_limits = {"queue_max_rows": 3}, {"queue_max_rows": 100}
    rollout.begin(1e-9)
    with accepted(rollout.gateway, 8) as clients:
        with one_turn(rollout.gateway):
            for n, client in enumerate(clients):
                client.send(infer("m", n))
        statuses = [client.reply().status for client in clients]
    assert statuses == [200] * 3 + [429] * 5
    assert rollout.stable_counts().requests == 3


def test_while_the_breaker_is_open_neither_arm_counts(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "RETRY_S", 0.3)
    rollout.begin(0.5, breaker_failures=2)
    canary, stable = iter(drawn_for("canary")), drawn_for("stable")
    fails(rollout)
    with rollout.gateway.connect() as client:
        ask(client, [next(canary), next(canary)])
        assert rollout.summary()["breaker"] == "open"
        ask(client, [*stable[:5], next(canary)])
        assert rollout.stable_counts().requests == 0
        rollout.canary.backend.failure = None
        # One finds out, and is in no count.
        eventually(lambda: ask(client, [next(canary)]) == ["canary"])
        assert rollout.summary()["breaker"] == "closed"
        ask(client, [*stable[5:7], next(canary)])
    counts = rollout.canary_counts()
    assert (counts.requests, counts.failed) == (3, 2)
    assert rollout.stable_counts().requests == 2
