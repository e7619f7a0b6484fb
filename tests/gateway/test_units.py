"""Users that stick to their arm: each is counted once, and fails once, in an epoch."""

from __future__ import annotations

import random

import pytest

from serving.core.rollout_counts import ArmCountsRow
from serving.gateway import units
from serving.gateway.units import Units
from tests.gateway.client import infer
from tests.gateway.models import RAISES
from tests.gateway.rollouts import Rollout, arm_of
from tests.gateway.test_draws import accepted, one_turn
from tests.gateway.test_shield import fails, timeout, two_canaries

__all__ = ["two_canaries"]  # a fixture

USERS = [f"X-User: user-{i}" for i in range(8)]


def counted(row: ArmCountsRow) -> tuple[int, int, int, int]:
    return row.requests, row.failed, row.batches, row.failed_batches


def test_a_user_counts_once_an_epoch(rollout: Rollout) -> None:
    header, unit = "X-User: somebody", "header:x-user"
    rollout.begin(1.0, epoch=1, unit=unit)
    with rollout.gateway.connect() as client:
        for _ in range(3):
            assert arm_of(client, header) == "canary"
        fails(rollout)
        for _ in range(3):
            assert arm_of(client, header) == "stable"
        rollout.begin(1.0, epoch=2, unit=unit)
        assert arm_of(client, header) == "stable"
        rollout.canary.backend.failure = None
        assert arm_of(client, header) == "canary"
    first, second = rollout.canary_counts(1), rollout.canary_counts(2)
    assert counted(first) == (1, 1, 1, 1)
    assert counted(second) == (1, 1, 1, 1)
    # Latency is that of every answer.
    assert (first.latency.total, first.batch_latency.total) == (3, 3)
    assert (second.latency.total, second.batch_latency.total) == (1, 1)
    assert first.attempts == (4, 1, 3, 1)


def test_a_request_that_is_tried_again_fails_once(rollout: Rollout) -> None:
    rollout.begin(1.0)
    fails(rollout)
    with rollout.gateway.connect() as client:
        for _ in range(3):
            assert arm_of(client, "X-Request-Id: tried-again") == "stable"
        rollout.canary.backend.failure = None
        assert arm_of(client, "X-Request-Id: tried-again") == "canary"
    # Of those that failed one counts; the answer is a request of its own.
    assert counted(rollout.canary_counts()) == (2, 1, 2, 1)


def test_a_fault_that_comes_late_is_as_many_failures_as_there_are_users(rollout: Rollout) -> None:
    rollout.begin(1.0, unit="header:x-user", breaker_failures=1000)
    with rollout.gateway.connect() as client:
        for _ in range(10):
            assert {arm_of(client, user) for user in USERS} == {"canary"}
        fails(rollout)
        assert {arm_of(client, user) for user in USERS} == {"stable"}
    assert counted(rollout.canary_counts()) == (8, 8, 8, 8)


def test_a_run_of_users_is_one_batch(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 8}
    rollout.begin(1.0, unit="header:x-user", breaker_failures=1000)
    with accepted(rollout.gateway, 8) as clients:
        for failed in (False, True, True):
            rollout.canary.backend.failure = RuntimeError("a bad version") if failed else None
            with one_turn(rollout.gateway):
                for client, user in zip(clients, USERS, strict=True):
                    client.send(infer("m", 1, headers=[user]))
            assert {client.reply().status for client in clients} == {200}
    row = rollout.canary_counts()
    assert row.requests == row.failed == 8
    assert row.failed_batches == 1
    assert row.batches <= 2


def test_a_user_that_waits_in_vain_is_known_after_stable_took_over(rollout: Rollout) -> None:
    rollout.begin(1.0, unit="header:x-user")
    rollout.canary.backend.gate.clear()
    with rollout.gateway.connect() as client:
        for _ in range(2):
            assert arm_of(client, "X-User: somebody", timeout(0.1)) == "stable"
        rollout.gateway.until(lambda: not list(rollout.gateway.batcher("m", "2").outstanding()))
    assert counted(rollout.canary_counts()) == (1, 1, 1, 1)


def test_a_user_counts_for_the_replica_that_failed(two_canaries: Rollout) -> None:
    rollout = two_canaries
    rollout.begin(1.0, unit="header:x-user", breaker_failures=1000)
    with rollout.gateway.connect() as client:
        assert arm_of(client, USERS[0]) == "canary"
        (first,) = rollout.counts().canary
        other = rollout.canaries[first == "canary-1"]
        other.backend.failure = RuntimeError("one bad GPU")
        arms = [arm_of(client, USERS[0]) for _ in range(2)]
    assert arms == ["stable", "canary"]
    rows = rollout.counts().canary
    assert (rows[first].requests, rows[first].failed) == (0, 0)
    assert (rows[other.endpoint.replica].requests, rows[other.endpoint.replica].failed) == (1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_there_are_never_more_failures_than_units(two_canaries: Rollout, seed: int) -> None:
    """`counts` refuses such a report, as the controller does. Some say who they are, some not."""
    rollout, chance = two_canaries, random.Random(seed)
    rollout.limits = {"max_size": 4}
    rollout.begin(0.8, unit="header:x-user", breaker_failures=1000)
    with accepted(rollout.gateway, 8) as clients:
        for _ in range(40):
            for replica in rollout.canaries:
                bad = chance.random() < 0.2
                replica.backend.failure = RuntimeError("a bad version") if bad else None
            with one_turn(rollout.gateway):
                for client in clients:
                    who = [chance.choice(USERS)] if chance.random() < 0.7 else []
                    value = RAISES if chance.random() < 0.1 else 1.0
                    client.send(infer("m", value, headers=who))
            assert {client.reply().status for client in clients} <= {200, 500}
            rollout.counts()
    arms = (rollout.canary_counts(), rollout.stable_counts())
    assert all(row.failed and row.requests > row.failed for row in arms)


def test_a_user_is_forgotten_after_so_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MOST", 2)
    known = Units(b"a salt")
    first, second = known.of(b"1"), known.of(b"2")
    assert known.of(b"1") is first
    known.of(b"3")
    assert known.of(b"1") is first
    assert known.of(b"2") is not second
    assert known.of(b"2").point == second.point
