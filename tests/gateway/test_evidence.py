"""What is evidence: requests that either arm could take, whichever they were drawn for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from serving.core.assignment import unit_point
from serving.gateway import breaker
from tests.gateway.client import Client, body, infer, post
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


@pytest.mark.parametrize("arm", ["stable", "canary"])
def test_a_draw_has_the_room_that_others_of_its_turn_leave_at_stable(
    rollout: Rollout, arm: str
) -> None:
    rollout.limits, rollout.canary_limits = {"queue_max_rows": 3}, {"queue_max_rows": 100}
    rollout.begin(1.0 if arm == "canary" else 1e-9)
    drawn, pinned = infer("m", 1), post("/v2/models/m/versions/1/infer", body(1))
    with accepted(rollout.gateway, 6) as clients:
        with one_turn(rollout.gateway):
            for client, request in zip(clients, [drawn, pinned, pinned, *[drawn] * 3], strict=True):
                client.send(request)
        statuses = [client.reply().status for client in clients]
    # Of the canary's, the first is alone with stable's two.
    assert statuses == [200] * 3 + [429 if arm == "stable" else 200] * 3
    assert rollout.counts().arm(arm).requests == 1


@pytest.mark.parametrize("arm", ["stable", "canary"])
def test_what_stable_refuses_of_a_draw_takes_no_room_from_the_rest(
    rollout: Rollout, arm: str
) -> None:
    rollout.limits, rollout.canary_limits = {"queue_max_rows": 4}, {"queue_max_rows": 100}
    rollout.begin(1.0 if arm == "canary" else 1e-9)
    with accepted(rollout.gateway, 3) as clients:
        with one_turn(rollout.gateway):
            for client, rows in zip(clients, (3, 5, 1), strict=True):
                client.send(infer("m", *range(rows)))
        statuses = [client.reply().status for client in clients]
    assert statuses == [200, 429 if arm == "stable" else 200, 200]
    assert rollout.counts().arm(arm).requests == 2


def lose_between(rollout: Rollout, version: str, clients: Sequence[Client]) -> None:
    """A version loses its replica in one turn, after the first client's request."""
    gateway = rollout.gateway
    first, *others = [gateway.connection(client) for client in clients]
    (link,) = gateway.batcher("m", version).links.values()

    def turn() -> None:
        first.data_received(infer("m", 1))
        link.lost()
        for connection in others:
            connection.data_received(infer("m", 1))

    gateway.run(turn)


def test_stable_lost_in_the_middle_of_a_draw_refuses_the_rest_at_once(rollout: Rollout) -> None:
    rollout.limits = {"queue_hold_s": 0.0}
    rollout.begin(1e-9)
    with callers(rollout.gateway, 3) as clients:
        lose_between(rollout, "1", clients)
        assert [client.reply().status for client in clients] == [503] * 3
    assert rollout.gateway.outcomes("m", "1") == {"unavailable": 3}


@pytest.mark.parametrize("arm", ["stable", "canary"])
def test_a_canary_lost_in_the_middle_of_a_draw_ends_what_counts_of_it(
    rollout: Rollout, arm: str
) -> None:
    rollout.begin(1.0 if arm == "canary" else 1e-9, shield=False)
    with callers(rollout.gateway, 3) as clients:
        lose_between(rollout, "2", clients)
        arms = [answered_by(client.reply()) for client in clients]
    assert arms == [arm, "stable", "stable"]
    assert rollout.counts().arm(arm).requests == 1


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
