"""Batches, and what becomes of their members when one of them leaves, fails or is late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from serving.gateway import links
from tests.gateway.client import Client, Reply, infer, post, tensor
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import (
    GIVES_NAN,
    IS_BAD_INPUT,
    LENGTHS,
    LOSES_A_ROW,
    RAISES,
    WHOLE,
    ScriptedBackend,
    build,
)

NEVER_S = 60.0


@contextmanager
def callers(gateway: Gateway, count: int) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        yield [stack.enter_context(gateway.connect()) for _ in range(count)]


def send_all(clients: list[Client], values: list[float], **members: object) -> None:
    for client, value in zip(clients, values, strict=True):
        client.send(infer("m", value, **members))


@pytest.fixture
def batches_of_8(gateway: Gateway, replica: Replica) -> Gateway:
    """A batch leaves when it has 8 rows, and not before."""
    gateway.publish(arm("m", [replica], max_size=8, max_delay_s=NEVER_S))
    return gateway


def test_a_batch_is_filled(batches_of_8: Gateway, replica: Replica) -> None:
    with callers(batches_of_8, 24) as clients:
        send_all(clients, list(range(24)))
        assert [c.reply().values[0] for c in clients] == [2 * i for i in range(24)]
    assert sorted(replica.backend.seen) == list(range(24))
    # The replica may merge what the gateway sent as several.
    assert all(len(run) % 8 == 0 for run in replica.backend.runs)


@pytest.mark.parametrize("where", ["waiting", "in flight"])
def test_cancel_each_position_of_a_batch(
    batches_of_8: Gateway, replica: Replica, where: str
) -> None:
    batcher = batches_of_8.batcher("m")
    for position in range(8):
        first = 100 * position
        values = [float(first + i) for i in range(8)]
        sent = values if where == "in flight" else values[:7]
        position = min(position, len(sent) - 1)
        replica.backend.gate.clear()
        with callers(batches_of_8, 10) as clients:
            send_all(clients[: len(sent)], sent)
            if where == "in flight":
                eventually(lambda: replica.backend.running)
            else:
                batches_of_8.until(lambda: batcher.queue_depth == 7)
            cancelled = batches_of_8.outcomes("m").get("cancelled", 0)
            clients[position].reset()
            eventually(lambda n=cancelled: batches_of_8.outcomes("m").get("cancelled", 0) == n + 1)
            rest = [c for i, c in enumerate(clients[: len(sent)]) if i != position]
            expected = [v for i, v in enumerate(sent) if i != position]
            if where == "waiting":
                assert batches_of_8.run(lambda: batcher.queue_depth) == 6
                send_all(clients[8:], [first + 90, first + 91])
                rest += clients[8:]
                expected += [first + 90, first + 91]
            replica.backend.gate.set()
            assert [c.reply().values[0] for c in rest] == [2 * v for v in expected]
        if where == "waiting":
            assert sent[position] not in replica.backend.seen
    assert batches_of_8.run(lambda: (batcher.queue_depth, batcher.in_flight)) == (0, 0)


@pytest.mark.parametrize(
    ("marker", "status"), [(RAISES, 500), (LOSES_A_ROW, 500), (IS_BAD_INPUT, 400), (GIVES_NAN, 400)]
)
def test_batch_mates_of_a_failing_request(
    batches_of_8: Gateway, replica: Replica, marker: float, status: int
) -> None:
    for position in (0, 3, 7):
        values = [float(i) for i in range(8)]
        values[position] = marker
        with callers(batches_of_8, 8) as clients:
            send_all(clients, values)
            replies = [c.reply() for c in clients]
        failed = replies.pop(position)
        assert failed.status == status
        assert failed.error
        assert [r.values[0] for r in replies] == [2 * v for v in values if v != marker]
    outcomes = batches_of_8.outcomes("m")
    assert outcomes.pop("success") == 21
    assert outcomes == {{500: "model_failed", 400: "invalid_request"}[status]: 3}


def test_rows_of_requests_of_different_sizes(batches_of_8: Gateway) -> None:
    sizes = [1, 3, 2, 2]
    with callers(batches_of_8, len(sizes)) as clients:
        for i, (client, size) in enumerate(zip(clients, sizes, strict=True)):
            client.send(infer("m", *(10 * i + row for row in range(size))))
        for i, (client, size) in enumerate(zip(clients, sizes, strict=True)):
            expected = [2 * (10 * i + row) for row in range(size) for _ in "xy"]
            assert client.reply().values == expected


def test_a_lone_request_leaves_after_the_delay(gateway: Gateway, replica: Replica) -> None:
    delay_s = 0.1
    gateway.publish(arm("m", [replica], max_delay_s=delay_s))
    with gateway.connect() as client:
        for i in range(3):
            reply = client.ask(infer("m", i))
            assert reply.values == [2 * i, 2 * i]
            assert delay_s * 1e3 - 2 < queue_ms(reply) < delay_s * 1e3 + 1000


def test_the_delay_of_a_request_that_left_its_batch(gateway: Gateway, replica: Replica) -> None:
    """Those behind it wait for their own delay, not for its."""
    gateway.publish(arm("m", [replica], max_delay_s=0.2))
    batcher = gateway.batcher("m")
    with gateway.connect() as second:
        first = gateway.connect()
        first.send(infer("m", 1))
        gateway.until(lambda: batcher.queue_depth == 1)
        second.send(infer("m", 2))
        gateway.until(lambda: batcher.queue_depth == 2)
        first.reset()
        reply = second.reply()
        assert reply.values == [4, 4]
        assert queue_ms(reply) > 198
    assert replica.backend.seen == [2]


def queue_ms(reply: Reply) -> float:
    return float(reply.headers["server-timing"].split("dur=")[1].split(",")[0])


def test_a_model_without_batches_waits_for_no_mates(
    gateway: Gateway, run_dir: Path, tmp_path: Path
) -> None:
    replica = Replica(build("whole", tmp_path), run_dir)
    gateway.publish(arm("whole", [replica], of=WHOLE, max_delay_s=NEVER_S))
    data = json.dumps({"inputs": [tensor("x", [1, 2, 3], "INT64", [3])]}).encode()
    with gateway.connect() as client:
        reply = client.ask(post("/v2/models/whole/infer", data))
        assert reply.values == [-1, -2, -3]
        assert queue_ms(reply) < 5_000
    replica.stop()


def test_shapes_do_not_mix(gateway: Gateway, run_dir: Path) -> None:
    backend = ScriptedBackend(LENGTHS)
    replica = Replica(backend, run_dir)
    gateway.publish(arm("m", [replica]))
    backend.gate.clear()
    rows = [[float(i)] * (1 + i % 3) for i in range(30)]
    with callers(gateway, 30) as clients:
        for client, row in zip(clients, rows, strict=True):
            client.send(infer("m", row))
        batcher = gateway.batcher("m")
        gateway.until(lambda: batcher.queue_depth + batcher.in_flight == 30)
        backend.gate.set()
        assert [c.reply().values for c in clients] == [[2 * v for v in row] for row in rows]
    # Those that waited travelled with their like.
    assert len(backend.runs) < 15
    for run in backend.runs:
        assert len({value % 3 for value in run}) == 1
    replica.stop()


@contextmanager
def plugged(gateway: Gateway, replica: Replica) -> Iterator[None]:
    """Every way to the replica is taken by a request; what comes now waits."""
    batcher = gateway.batcher("m")
    replica.backend.gate.clear()
    with callers(gateway, links.BATCHES_IN_FLIGHT) as clients:
        try:
            for i, client in enumerate(clients):
                client.send(infer("m", 900 + i))
                gateway.until(lambda n=i: batcher.in_flight == n + 1)
                # There, not only on its way: two might overtake each other.
                eventually(
                    lambda n=i: replica.backend.running and replica.server.engine.waiting == n
                )
            yield
        finally:
            replica.backend.gate.set()
        assert [c.reply().values[0] for c in clients] == [1800, 1802][: len(clients)]


def test_urgent_requests_leave_first(
    gateway: Gateway, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two batches sent at once may overtake each other on their way.
    monkeypatch.setattr(links, "BATCHES_IN_FLIGHT", 1)
    gateway.publish(arm("m", [replica]))
    batcher = gateway.batcher("m")
    levels = [9, 5, 0, 1, 7, 1]
    with callers(gateway, len(levels)) as clients:
        with plugged(gateway, replica):
            for i, (client, level) in enumerate(zip(clients, levels, strict=True)):
                client.send(infer("m", i, parameters={"priority": level}))
                gateway.until(lambda n=i: batcher.queue_depth == n + 1)
        for i, client in enumerate(clients):
            assert client.reply().values[0] == 2 * i
    # 0 is the default, 5; at one level the order of arrival holds.
    assert replica.backend.seen[1:] == [3, 5, 1, 2, 4, 0]


def test_a_priority_that_does_not_exist(served: Gateway) -> None:
    before = served.outcomes("m").get("invalid_request", 0)
    with served.connect() as client:
        for level in (10, -1, 1.5, "high", True):
            assert client.ask(infer("m", 1, parameters={"priority": level})).status == 400
    assert served.outcomes("m")["invalid_request"] == before + 5


def test_cancelled_requests_take_no_memory_or_room(gateway: Gateway, replica: Replica) -> None:
    """However many callers come and go while the replica is busy."""
    gateway.publish(arm("m", [replica], queue_max_rows=4))
    batcher = gateway.batcher("m")
    with plugged(gateway, replica):
        for i in range(30):
            client = gateway.connect()
            client.send(infer("m", i))
            gateway.until(lambda: batcher.queue_depth == 1)
            client.reset()
            gateway.until(lambda: batcher.queue_depth == 0)
        assert gateway.run(lambda: list(batcher._queue)) == []
    assert replica.backend.seen == [900, 901]
