"""Clients that give up: theirs are slow answers, where they waited for longer than the bound."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.gateway.client import Client, infer
from tests.gateway.harness import eventually
from tests.gateway.rollouts import Rollout, answered_by
from tests.gateway.test_batches import callers
from tests.gateway.test_draws import accepted, one_turn


def leave(rollout: Rollout, version: str, clients: Sequence[Client]) -> None:
    """Clients give up one after another."""
    before = rollout.gateway.outcomes("m", version).get("cancelled", 0)
    for n, client in enumerate(clients, before + 1):
        client.reset()
        eventually(lambda n=n: rollout.gateway.outcomes("m", version).get("cancelled") == n)


@pytest.mark.parametrize("version", ["1", "2"])
def test_after_the_bound_it_is_a_slow_answer(rollout: Rollout, version: str) -> None:
    rollout.begin(1.0 if version == "2" else 0.0, latency_bound_s=1e-6)
    replica = rollout.canary if version == "2" else rollout.stable
    batcher = rollout.gateway.batcher("m", version)
    replica.backend.gate.clear()
    with callers(rollout.gateway, 3) as clients:
        for n, client in enumerate(clients, 1):
            client.send(infer("m", n))
            rollout.gateway.until(lambda n=n: batcher.in_flight + batcher.queue_depth == n)
        # Two run, and the last waits behind them.
        assert batcher.queue_depth == 1
        leave(rollout, version, clients)
    rows = rollout.counts().replicas("canary" if version == "2" else "stable")
    row = rows[replica.endpoint.replica]
    assert len(rows) == 1
    assert (row.latency.total, row.given_up) == (3, 3)
    # The one that waited shares the fate of what it waited for.
    assert (row.batch_latency.total, row.given_up_batches) == (2, 2)
    assert (row.requests, row.failed, row.batches, row.failed_batches) == (0, 0, 0, 0)
    assert row.attempts == (0, 0, 0, 0)
    assert rollout.summary()["opened"] == 0


def test_before_the_bound_it_says_nothing(rollout: Rollout) -> None:
    rollout.begin(1.0, latency_bound_s=60.0)
    rollout.canary.backend.gate.clear()
    with rollout.gateway.connect() as client:
        client.send(infer("m", 1))
        eventually(lambda: rollout.canary.backend.running)
        leave(rollout, "2", [client])
    assert rollout.report()["trials"] == []


def test_their_run_is_one_whoever_of_it_waits_on(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 4, "max_delay_s": 60.0}
    rollout.begin(1.0, latency_bound_s=1e-6)
    rollout.canary.backend.gate.clear()
    with callers(rollout.gateway, 4) as clients:
        for n, client in enumerate(clients):
            client.send(infer("m", n))
        eventually(lambda: rollout.canary.backend.running)
        leave(rollout, "2", clients[:2])
        assert rollout.canary_counts().batch_latency.total == 1
        rollout.canary.backend.gate.set()
        assert {answered_by(client.reply()) for client in clients[2:]} == {"canary"}
    row = rollout.canary_counts()
    assert (row.requests, row.latency.total, row.batch_latency.total) == (2, 4, 1)
    assert row.attempts == (2, 0, 1, 0)


def test_their_draw_is_one_in_however_many_runs(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 1}
    rollout.begin(1.0, latency_bound_s=1e-6)
    rollout.canary.backend.gate.clear()
    batcher = rollout.gateway.batcher("m", "2")
    with accepted(rollout.gateway, 4) as clients:
        with one_turn(rollout.gateway):
            for n, client in enumerate(clients):
                client.send(infer("m", n))
        rollout.gateway.until(lambda: batcher.in_flight + batcher.queue_depth == 4)
        leave(rollout, "2", clients[:3])
        rollout.canary.backend.gate.set()
        assert answered_by(clients[3].reply()) == "canary"
    row = rollout.canary_counts()
    assert (row.requests, row.latency.total, row.batch_latency.total) == (1, 4, 1)


def test_each_of_a_users_runs_is_one(rollout: Rollout) -> None:
    rollout.begin(1.0, unit="header:x-user", latency_bound_s=1e-6)
    for n in range(1, 3):
        rollout.canary.backend.gate.clear()
        with rollout.gateway.connect() as client:
            client.send(infer("m", 1, headers=["X-User: somebody"]))
            eventually(lambda: rollout.canary.backend.running)
            leave(rollout, "2", [client])
        rollout.canary.backend.gate.set()
        rollout.gateway.until(lambda: not rollout.gateway.batcher("m", "2").in_flight)
        row = rollout.canary_counts()
        assert (row.latency.total, row.batch_latency.total) == (n, n)
