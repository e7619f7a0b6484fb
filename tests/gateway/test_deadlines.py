"""Deadlines, the bounded queue, and overload."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from serving.gateway.infer import Pipeline
from tests.gateway.client import Client, Reply, infer
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import VECTOR, ScriptedBackend
from tests.gateway.test_batches import callers, plugged


def timed(client: Client, *parts: bytes) -> tuple[float, Reply]:
    started = time.monotonic()
    reply = client.ask(*parts)
    return time.monotonic() - started, reply


def by_parameter(timeout_s: float, value: float = 1.0) -> bytes:
    return infer("m", value, parameters={"timeout": round(timeout_s * 1e6)})


def by_header(timeout_s: float, value: float = 1.0) -> bytes:
    return infer("m", value, headers=[f"X-Request-Timeout-Ms: {timeout_s * 1e3:g}"])


def check_lateness(taken: list[float], timeout_s: float) -> None:
    """At the deadline ± 50 ms; a loaded machine may delay some, not all."""
    assert min(taken) > timeout_s - 0.002
    assert min(taken) < timeout_s + 0.05


@pytest.mark.parametrize("make", [by_parameter, by_header])
def test_a_deadline_that_passes_while_waiting(
    gateway: Gateway, replica: Replica, make: Callable[[float, float], bytes]
) -> None:
    gateway.publish(arm("m", [replica]))
    taken = []
    with plugged(gateway, replica), gateway.connect() as client:
        for _ in range(4):
            seconds, reply = timed(client, make(0.1, 666.0))
            taken.append(seconds)
            assert reply.status == 504
            assert "waiting" in reply.error
        assert gateway.run(lambda: gateway.batcher("m").queue_depth) == 0
    check_lateness(taken, 0.1)
    # What is late does not reach the model.
    with gateway.connect() as client:
        assert client.ask(infer("m", 3)).values == [6, 6]
    assert replica.backend.seen == [900, 901, 3]


def test_a_deadline_that_passes_in_a_hung_replica(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica], timeout_s=0.1))
    replica.backend.gate.clear()
    taken = []
    # Two fill the ways to the replica, the others wait for one.
    with callers(gateway, 4) as clients:
        for client in clients:
            seconds, reply = timed(client, infer("m", 5))
            taken.append(seconds)
            assert reply.status == 504
            assert ("running" if len(taken) <= 2 else "waiting") in reply.error
        check_lateness(taken, 0.1)
        assert gateway.outcomes("m") == {"deadline_exceeded": 4}
        replica.backend.gate.set()
        gateway.until(lambda: not gateway.batcher("m").in_flight)
        for client in clients:
            assert client.ask(infer("m", 6)).values == [12, 12]
    assert replica.backend.seen.count(5) <= 2


def test_a_deadline_that_nobody_has_noticed_yet(
    gateway: Gateway, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks at the deadlines a batch may leave: not with what is late."""
    gateway.publish(arm("m", [replica]))
    monkeypatch.setattr(Pipeline, "_watch", lambda pipeline, deadline: None)
    batcher = gateway.batcher("m")
    with callers(gateway, 3) as clients:
        with plugged(gateway, replica):
            for client, timeout_s in zip(clients, (30.0, 0.05, 30.0), strict=True):
                client.send(by_parameter(timeout_s, 1.0 if timeout_s > 1 else 666.0))
            gateway.until(lambda: batcher.queue_depth == 3)
            deadlines = gateway.run(lambda: [call.deadline for call in batcher.outstanding()])
            eventually(lambda: time.monotonic() > min(deadlines))
        assert [c.reply().status for c in clients] == [200, 504, 200]
    assert 666.0 not in replica.backend.seen
    assert gateway.outcomes("m") == {"success": 4, "deadline_exceeded": 1}


def test_many_deadlines_close_together(gateway: Gateway, replica: Replica) -> None:
    """All are met, and looking for them leaves the loop free."""
    gateway.publish(arm("m", [replica]))
    count = 1000
    with plugged(gateway, replica), ExitStack() as stack:
        clients = [stack.enter_context(gateway.connect()) for _ in range(count)]
        started = time.monotonic()
        for i, client in enumerate(clients):
            client.send(by_parameter(0.2 + i * 1e-3))
        replies = [client.reply() for client in clients]
        assert time.monotonic() - started < 0.2 + count * 1e-3 + 2
        assert {r.status for r in replies} == {504}
    assert replica.backend.seen == [900, 901]


def test_an_earlier_deadline_behind_a_later_one(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica]))
    with plugged(gateway, replica), callers(gateway, 3) as clients:
        started = time.monotonic()
        for client, timeout_s in zip(clients, (0.3, 0.1, 0.2), strict=True):
            client.send(by_parameter(timeout_s))
        for client in (clients[1], clients[2], clients[0]):
            assert client.reply().status == 504
        assert 0.298 < time.monotonic() - started < 2


def test_a_pipelined_request_admitted_by_an_expiry_has_its_own(
    gateway: Gateway, replica: Replica
) -> None:
    """The reply to one that is late lets the next one of its connection in."""
    gateway.publish(arm("m", [replica]))
    with plugged(gateway, replica), gateway.connect() as client:
        started = time.monotonic()
        client.send(by_parameter(0.1), by_parameter(0.05), by_parameter(0.1))
        assert [client.reply().status for _ in range(3)] == [504, 504, 504]
        assert 0.245 < time.monotonic() - started < 2


def test_the_parameter_wins_over_the_header(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica]))
    both = {"headers": ["X-Request-Timeout-Ms: 30000"], "parameters": {"timeout": 50_000}}
    with plugged(gateway, replica), gateway.connect() as client:
        assert client.ask(infer("m", 1, **both)).status == 504


@pytest.mark.parametrize("value", ["", "0", "-5", "soon", "nan", "inf", "1e12", "5;6"])
def test_a_header_that_is_no_timeout(served: Gateway, value: str) -> None:
    with served.connect() as client:
        reply = client.ask(infer("m", 1, headers=[f"X-Request-Timeout-Ms: {value}"]))
        assert reply.status == 400
        assert "x-request-timeout-ms" in reply.error
        assert client.ask(infer("m", 1, parameters={"timeout": -1})).status == 400


def test_a_full_queue(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica], queue_max_rows=5))
    batcher = gateway.batcher("m")
    with callers(gateway, 5) as clients, gateway.connect() as late:
        with plugged(gateway, replica):
            for i, client in enumerate(clients):
                client.send(infer("m", i))
            gateway.until(lambda: batcher.queue_depth == 5)
            seconds, reply = timed(late, infer("m", 9))
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert seconds < 1
            assert "5 rows are waiting" in reply.error
        assert [c.reply().values[0] for c in clients] == [0, 2, 4, 6, 8]
        assert late.ask(infer("m", 9)).values == [18, 18]
    assert gateway.outcomes("m") == {"success": 8, "overloaded": 1}


class SlowBackend(ScriptedBackend):
    """Takes `SECONDS` for a run."""

    SECONDS = 0.05

    def run(self, inputs):
        threading.Event().wait(self.SECONDS)
        return super().run(inputs)


def test_overload_is_answered_early_and_the_admitted_keep_their_latency(
    gateway: Gateway, run_dir: Path
) -> None:
    replica = Replica(SlowBackend(), run_dir, max_size=1)
    allowed_s = 0.25
    gateway.publish(arm("m", [replica], max_size=1, queue_max_wait_s=allowed_s))
    with callers(gateway, 40) as clients:
        for _ in range(3):
            assert clients[0].ask(infer("m", 1)).status == 200
        taken: list[tuple[float, Reply]] = []

        def ask(client: Client) -> None:
            taken.append(timed(client, infer("m", 1)))

        threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = [(seconds, r) for seconds, r in taken if r.status == 429]
    admitted = [seconds for seconds, r in taken if r.status == 200]
    assert len(refused) + len(admitted) == 40
    assert all(int(r.headers["retry-after"]) >= 1 for _, r in refused)
    # Two are in flight and a quarter of a second's worth waits; a slow run makes it fewer.
    assert 2 <= len(admitted) <= 2 + allowed_s / SlowBackend.SECONDS + 2
    assert max(seconds for seconds, _ in refused) < min(1.0, max(admitted) + 0.1)
    assert max(admitted) < allowed_s + 4 * SlowBackend.SECONDS + 0.5
    replica.stop()


def test_a_wait_beyond_the_deadline_is_refused_at_once(gateway: Gateway, run_dir: Path) -> None:
    replica = Replica(SlowBackend(), run_dir, max_size=1)
    gateway.publish(arm("m", [replica], max_size=1))
    batcher = gateway.batcher("m")
    with callers(gateway, 12) as clients:
        assert clients[0].ask(infer("m", 1)).status == 200
        for client in clients[:10]:
            client.send(infer("m", 1))
        gateway.until(lambda: batcher.queue_depth + batcher.in_flight == 10)
        replies = [c.ask(by_parameter(0.06)) for c in clients[10:]]
        assert {r.status for r in replies} == {429}
        assert [c.reply().status for c in clients[:10]] == [200] * 10
    replica.stop()


def test_no_replica_for_a_while(gateway: Gateway, run_dir: Path) -> None:
    """Requests wait for one, for as long as they may be held."""
    path_only = Replica(ScriptedBackend(), run_dir)
    path_only.stop()
    gateway.publish(arm("m", [path_only], queue_hold_s=30.0), ready=False)
    with callers(gateway, 3) as clients:
        for i, client in enumerate(clients):
            client.send(infer("m", i))
        gateway.until(lambda: gateway.batcher("m").queue_depth == 3)
        replica = Replica(ScriptedBackend(), run_dir)
        assert [c.reply().values[0] for c in clients] == [0, 2, 4]
    replica.stop()


def test_no_replica_for_too_long(gateway: Gateway) -> None:
    hold_s = 0.3
    gateway.publish(arm("m", [], of=VECTOR, queue_hold_s=hold_s))
    with gateway.connect() as client:
        seconds, reply = timed(client, infer("m", 1))
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert "no replica" in reply.error
        assert seconds < hold_s + 1
        # From now on nothing is held.
        seconds, reply = timed(client, infer("m", 1))
        assert reply.status == 503
        assert seconds < hold_s / 2 + 0.1
    assert gateway.outcomes("m") == {"unavailable": 2}


def test_a_request_at_the_very_end_of_the_hold(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer may fire a tick early: whoever comes in that tick finds nobody to wake it."""
    gateway.publish(arm("m", [], of=VECTOR, queue_hold_s=60.0, timeout_s=600.0))
    batcher = gateway.batcher("m")
    end = batcher._down_since + 60.0
    monkeypatch.setattr("serving.gateway.admission.monotonic", lambda: end - 0.0005)
    gateway.run(batcher._hold_on)
    with gateway.connect() as client:
        assert client.ask(infer("m", 1)).status == 503


def test_the_hold_starts_anew_with_each_loss(gateway: Gateway, run_dir: Path) -> None:
    hold_s = 0.4
    replica = Replica(ScriptedBackend(), run_dir)
    gateway.publish(arm("m", [replica], queue_hold_s=hold_s))
    batcher = gateway.batcher("m")
    with gateway.connect() as client:
        for _ in range(2):
            replica.stop()
            gateway.until(lambda: not batcher.ready)
            seconds, reply = timed(client, infer("m", 1))
            assert reply.status == 503
            assert hold_s / 2 < seconds < hold_s + 1
            replica = Replica(ScriptedBackend(), run_dir)
            gateway.until(lambda: batcher.ready)
            assert client.ask(infer("m", 1)).values == [2, 2]
    replica.stop()


def test_a_hold_may_be_prolonged(gateway: Gateway, run_dir: Path) -> None:
    """By a new table, while requests wait."""
    gateway.publish(arm("m", [], of=VECTOR, queue_hold_s=0.3))
    with gateway.connect() as client:
        client.send(infer("m", 1))
        batcher = gateway.batcher("m")
        gateway.until(lambda: batcher.queue_depth == 1)
        gateway.publish(arm("m", [], of=VECTOR, queue_hold_s=0.9))
        started = time.monotonic()
        assert client.reply().status == 503
        assert time.monotonic() - started > 0.3


def test_the_replica_is_told_what_is_left_of_a_deadline(gateway: Gateway, replica: Replica) -> None:
    """A batch that waits at the replica past its last deadline does not run."""
    gateway.publish(arm("m", [replica]))
    replica.backend.gate.clear()
    with callers(gateway, 2) as clients:
        clients[0].send(infer("m", 1))
        eventually(lambda: replica.backend.running)
        clients[1].send(by_parameter(0.1, 7.0))
        # It took the second way to the replica, and waits there: for 0.1 s from then at most.
        eventually(lambda: replica.server.engine.waiting)
        late = time.monotonic() + 0.1
        assert clients[1].reply().status == 504
        eventually(lambda: time.monotonic() > late)
        replica.backend.gate.set()
        assert clients[0].reply().values == [2, 2]
        gateway.until(lambda: not gateway.batcher("m").in_flight)
    assert replica.backend.seen == [1]
