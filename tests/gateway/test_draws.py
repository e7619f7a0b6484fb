"""Requests that arrive at once are drawn together, and counted as the one event they are."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from serving.core.assignment import unit_point
from serving.core.rollout_counts import ArmCountsRow
from serving.gateway.draws import MOST, Draws
from serving.gateway.tally import Tally
from serving.gateway.trials import Cluster, Counted, Draw
from tests.gateway.client import Client, infer
from tests.gateway.harness import PATIENCE_S, Gateway
from tests.gateway.models import RAISES
from tests.gateway.rollouts import SALT, Rollout, answered_by
from tests.gateway.test_batches import callers


def points(draws: Draws, count: int) -> tuple[list[float], list[Draw]]:
    """Where `count` requests of one turn lie, and their draws, as a splitter takes them."""
    found, shared = [], []
    for _ in range(count):
        if not draws.left:
            draws.begin()
        draws.left -= 1
        found.append(draws.point)
        shared.append(draws.draw)
    return found, shared


def test_a_turn_is_a_draw() -> None:
    async def turns() -> None:
        draws = Draws(asyncio.get_running_loop())
        seen = set()
        for size in (1, 2, 5, MOST):
            found, shared = points(draws, size)
            assert len(set(found)) == len(set(shared)) == 1
            seen.add(found[0])
            await asyncio.sleep(0)
        assert len(seen) == 4

    asyncio.run(turns())


def test_a_long_turn_is_several() -> None:
    async def turn() -> None:
        found, shared = points(Draws(asyncio.get_running_loop()), 2 * MOST + 3)
        assert [found.count(point) for point in dict.fromkeys(found)] == [MOST, MOST, 3]
        assert [shared.count(draw) for draw in dict.fromkeys(shared)] == [MOST, MOST, 3]

    asyncio.run(turn())


def test_a_new_epoch_is_a_new_draw() -> None:
    async def turn() -> None:
        draws = Draws(asyncio.get_running_loop())
        (before,), _ = points(draws, 1)
        draws.end()
        (after,), _ = points(draws, 1)
        assert before != after

    asyncio.run(turn())


def test_each_request_has_its_chance_however_large_its_turn() -> None:
    """Draws are fair although turns grow after a stable one, as they do when stable is slower."""

    async def turns(weight: float, count: int) -> tuple[list[int], list[int]]:
        draws = Draws(asyncio.get_running_loop())
        size, canary, stable = 1, [], []
        for _ in range(count):
            point = points(draws, size)[0][0]
            (canary if point < weight else stable).append(size)
            size = min(2 * size, MOST) if point >= weight else 1
            await asyncio.sleep(0)
        return canary, stable

    weight, count = 0.2, 10_000
    canary, stable = asyncio.run(turns(weight, count))
    assert abs(len(canary) - weight * count) < 5 * math.sqrt(count * weight * (1 - weight))
    sizes = canary + stable
    # Of requests too: the martingale Σ size·(1{canary} − weight).
    spread = math.sqrt(weight * (1 - weight) * sum(size**2 for size in sizes))
    assert abs(sum(canary) - weight * sum(sizes)) < 5 * spread


@contextmanager
def accepted(gateway: Gateway, count: int) -> Iterator[list[Client]]:
    """Clients whose connections the gateway reads."""
    with callers(gateway, count) as clients:
        for client in clients:
            gateway.connection(client)
        yield clients


@contextmanager
def one_turn(gateway: Gateway) -> Iterator[None]:
    """What is sent meanwhile, the gateway reads in one turn of its loop."""
    halted, go_on = threading.Event(), threading.Event()

    def halt() -> None:
        halted.set()
        assert go_on.wait(PATIENCE_S)

    gateway.loop.call_soon_threadsafe(halt)
    assert halted.wait(PATIENCE_S)
    try:
        yield
    finally:
        go_on.set()


def ask_at_once(
    rollout: Rollout, clients: Sequence[Client], values: Sequence[float], *headers: str
) -> list[str]:
    """The arms that answer requests of one turn, which must succeed."""
    with one_turn(rollout.gateway):
        for i, (client, value) in enumerate(zip(clients, values, strict=True)):
            client.send(infer("m", value, headers=[header.format(i) for header in headers]))
    return [answered_by(client.reply()) for client in clients]


def test_what_arrives_at_once_goes_to_one_arm(rollout: Rollout) -> None:
    rollout.begin(0.5)
    turns = 40
    with accepted(rollout.gateway, 6) as clients:
        arms = [ask_at_once(rollout, clients, range(6)) for _ in range(turns)]
    assert all(len(set(turn)) == 1 for turn in arms)
    chosen = [turn[0] for turn in arms]
    # One time in 10^12 all go to one.
    assert set(chosen) == {"canary", "stable"}
    for row, role in (
        (rollout.canary_counts(), "canary"),
        (rollout.stable_counts(), "stable"),
    ):
        assert (row.requests, row.batches) == (6 * chosen.count(role), chosen.count(role))


def test_ids_and_overrides_are_not_drawn(rollout: Rollout) -> None:
    rollout.begin(0.5, overrides=(("x-canary", "always", "canary"),))
    with accepted(rollout.gateway, 12) as clients:
        arms = ask_at_once(rollout, clients, range(12), "X-Request-Id: request-{}")
        points = [unit_point(SALT.encode(), b"request-%d" % i) for i in range(12)]
        assert arms == ["canary" if point < 0.5 else "stable" for point in points]
        assert set(arms) == {"canary", "stable"}
        arms = ask_at_once(rollout, clients, range(12), "X-Canary: always")
        assert set(arms) == {"canary"}


def test_users_stay_where_they_are(rollout: Rollout) -> None:
    rollout.begin(0.5, unit="header:x-user")
    with accepted(rollout.gateway, 12) as clients:
        arms = ask_at_once(rollout, clients, range(12), "X-User: {}")
    points = [unit_point(SALT.encode(), b"%d" % i) for i in range(12)]
    assert arms == ["canary" if point < 0.5 else "stable" for point in points]
    assert set(arms) == {"canary", "stable"}


def counted(row: ArmCountsRow) -> tuple[int, int, int, int]:
    return row.requests, row.failed, row.batches, row.failed_batches


def test_a_draw_of_several_runs_is_one_event(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 2}
    rollout.begin(1.0)
    with accepted(rollout.gateway, 6) as clients:
        assert ask_at_once(rollout, clients, range(6)) == ["canary"] * 6
    row = rollout.canary_counts()
    assert len(rollout.canary.backend.runs) > 1
    assert counted(row) == (6, 0, 1, 0)
    assert (row.latency.total, row.batch_latency.total) == (6, 1)


def test_a_draw_of_several_runs_that_fail_is_one_failure(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 2}
    rollout.begin(1.0)
    rollout.canary.backend.failure = RuntimeError("a bad version")
    with accepted(rollout.gateway, 6) as clients:
        assert ask_at_once(rollout, clients, range(6)) == ["stable"] * 6
    assert counted(rollout.canary_counts()) == (6, 6, 1, 1)


@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_draw_fails_with_any_of_its_runs(rollout: Rollout, bad: int) -> None:
    rollout.limits = {"max_size": 2}
    rollout.begin(1.0)
    values = [RAISES if i == bad else float(i) for i in range(6)]
    with accepted(rollout.gateway, 6) as clients:
        with one_turn(rollout.gateway):
            for client, value in zip(clients, values, strict=True):
                client.send(infer("m", value))
        replies = [client.reply() for client in clients]
        # Stable fails it, too.
        assert [reply.status for reply in replies].index(500) == bad
        # A draw and a run of its own.
        assert answered_by(clients[0].ask(infer("m", 1))) == "canary"
    assert counted(rollout.canary_counts()) == (7, 1, 2, 1)


def test_a_run_of_several_draws_is_one_event(rollout: Rollout) -> None:
    rollout.limits = {"max_size": 8, "max_delay_s": 60.0}
    rollout.begin(1.0)
    gateway = rollout.gateway
    rollout.canary.backend.failure = RuntimeError("a bad version")
    with accepted(gateway, 8) as clients:
        for part, before in ((clients[:4], 0), (clients[4:], 4)):
            gateway.until(lambda n=before: gateway.batcher("m", "2").queue_depth == n)
            with one_turn(gateway):
                for client in part:
                    client.send(infer("m", 1))
        assert [answered_by(client.reply()) for client in clients] == ["stable"] * 8
    assert counted(rollout.canary_counts()) == (8, 8, 1, 1)


def test_a_draw_whose_replicas_differ_fails_where_it_was_counted() -> None:
    """`failed_batches` never exceeds `batches`, whichever replica answered and which failed."""
    draw, first, second, trial = Draw(), Tally(), Tally(), object()
    draw.batch = Counted(first)
    assert Cluster().count_failure(trial, second, draw)  # type: ignore[arg-type]
    assert not Cluster().count_failure(trial, second, draw)  # type: ignore[arg-type]
    assert (first.batches, first.failed_batches) == (1, 1)
    assert (second.batches, second.failed_batches) == (0, 0)


def test_no_batch_fails_twice_however_its_draws_are_scattered() -> None:
    """The controller reads no row with more failed batches than batches."""
    tally, trial = Tally(), object()
    earlier, split = Draw(), Draw()
    # Both draws were in a run that failed; alone, a request of the second was answered.
    run = Cluster()
    split.batch = run.count(trial, tally)  # type: ignore[arg-type]
    # Its rest fails in a run of its own, then the first draw's request alone.
    assert Cluster().count_failure(trial, tally, split)  # type: ignore[arg-type]
    assert not run.count_failure(trial, tally, earlier)  # type: ignore[arg-type]
    assert (tally.batches, tally.failed_batches) == (1, 1)
