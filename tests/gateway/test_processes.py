"""Replicas as processes, killed and stopped with requests in flight."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest

from serving.gateway import links
from tests.gateway.client import Client, Reply, infer
from tests.gateway.harness import Gateway, ReplicaProcess, arm, eventually
from tests.gateway.models import KILLS_REPLICA
from tests.gateway.test_batches import NEVER_S, callers, send_all

Start = Callable[[str], ReplicaProcess]


class Load:
    """Clients that ask one request after another and check every answer."""

    def __init__(self, gateway: Gateway, clients: int = 8) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._gateway = gateway
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(clients)]

    def _ask(self, seed: int) -> None:
        value = seed * 1_000_000
        with Client(self._gateway.port) as client:
            while not self._stop.is_set():
                # Below the values that make the model misbehave, or above.
                value += 1
                try:
                    reply = client.ask(infer("m", value % 1000))
                    if reply.status != 200 or reply.values[0] != 2 * (value % 1000):
                        self.wrong.append(str(reply))
                except OSError as error:
                    self.wrong.append(repr(error))
                    return
                self.answered += 1

    def more(self, count: int) -> None:
        """Wait until that many more requests are answered."""
        goal = self.answered + count
        eventually(lambda: self.answered >= goal or self.wrong, f"{count} more answers")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def answer_to_poison(gateway: Gateway, count: int, at: int) -> Reply:
    """The reply to number `at` of `count` requests at once, which kills; the others come right."""
    values = [float(i) for i in range(count)]
    values[at] = KILLS_REPLICA
    with callers(gateway, count) as clients:
        send_all(clients, values)
        replies = [client.reply() for client in clients]
    poisoned = replies.pop(at)
    assert [r.values[0] for r in replies] == [2 * v for v in values if v != KILLS_REPLICA]
    return poisoned


def test_killed_replicas_cost_no_request(gateway: Gateway, processes: Start) -> None:
    """One after the other dies under load and comes back at the same path."""
    replicas = [processes(name) for name in ("a", "b")]
    gateway.publish(arm("m", replicas))
    batcher = gateway.batcher("m")
    with Load(gateway) as load:
        for _ in range(2):
            for replica in replicas:
                load.more(200)
                replica.signal(signal.SIGKILL)
                replica.stop()
                load.more(200)
                replica.start()
                gateway.until(lambda: batcher.replicas_connected == 2)
    assert load.wrong == []
    assert set(gateway.outcomes("m")) == {"success"}


def test_a_replica_killed_with_a_batch_in_flight(gateway: Gateway, processes: Start) -> None:
    first, second = processes("a"), processes("b")
    gateway.publish(arm("m", [first], max_size=8, max_delay_s=NEVER_S))
    batcher = gateway.batcher("m")
    first.command("shut")
    with callers(gateway, 8) as clients:
        send_all(clients, list(range(8)))
        gateway.until(lambda: batcher.in_flight == 8)
        gateway.publish(arm("m", [first, second], max_size=8, max_delay_s=NEVER_S))
        first.signal(signal.SIGKILL)
        assert [c.reply().values[0] for c in clients] == [2 * i for i in range(8)]


def test_what_was_lost_is_kept_until_there_is_a_replica(gateway: Gateway, processes: Start) -> None:
    only = processes("a")
    gateway.publish(arm("m", [only]))
    batcher = gateway.batcher("m")
    only.command("shut")
    with callers(gateway, 3) as clients:
        send_all(clients, [1, 2, 3])
        gateway.until(lambda: batcher.in_flight + batcher.queue_depth == 3)
        only.signal(signal.SIGKILL)
        gateway.until(lambda: batcher.queue_depth == 3)
        only.stop()
        only.start()
        assert [c.reply().values[0] for c in clients] == [2, 4, 6]


def test_a_poison_request_fails_alone(gateway: Gateway, processes: Start) -> None:
    """It kills two replicas, and nobody else comes to harm: neither its batch-mates nor others."""
    replicas = [processes(name) for name in ("a", "b", "c")]
    gateway.publish(arm("m", replicas, max_size=8, max_delay_s=NEVER_S))
    poisoned = answer_to_poison(gateway, 8, at=5)
    assert poisoned.status == 503
    assert "lost during the run, 2 times" in poisoned.error
    eventually(lambda: sum(r.dead for r in replicas) == 2)


def test_poison_under_load(gateway: Gateway, processes: Start) -> None:
    """A suspect has a replica to itself, whatever else is to be done."""
    replicas = [processes(name) for name in ("a", "b", "c")]
    gateway.publish(arm("m", replicas))
    with Load(gateway, clients=6) as load, gateway.connect() as client:
        load.more(100)
        assert client.ask(infer("m", KILLS_REPLICA)).status == 503
        load.more(100)
    assert load.wrong == []
    # Its connections are gone a moment before the process.
    eventually(lambda: sum(r.dead for r in replicas) == 2)
    assert gateway.outcomes("m")["unavailable"] == 1


def test_a_stopped_replica_is_taken_out(
    gateway: Gateway, processes: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its connections and says nothing: three missed heartbeats are the end of it."""
    monkeypatch.setattr(links, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(links, "CONNECT_TIMEOUT_S", 0.2)
    first, second = processes("a"), processes("b")
    gateway.publish(arm("m", [first, second]))
    batcher = gateway.batcher("m")
    with callers(gateway, 4) as clients:
        first.signal(signal.SIGSTOP)
        started = time.monotonic()
        send_all(clients, [1, 2, 3, 4])
        assert [c.reply().values[0] for c in clients] == [2, 4, 6, 8]
        gateway.until(lambda: batcher.replicas_connected == 1)
        assert time.monotonic() - started < 3 * 0.1 + 3
        assert clients[0].ask(infer("m", 5)).values == [10, 10]
        first.signal(signal.SIGCONT)
        gateway.until(lambda: batcher.replicas_connected == 2)
    assert gateway.outcomes("m") == {"success": 5}


def test_a_stopped_gateway_does_not_blame_its_replicas(
    gateway: Gateway, processes: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that was held up for long finds its heartbeats answered."""
    monkeypatch.setattr(links, "HEARTBEAT_S", 0.1)
    replica = processes("a")
    gateway.publish(arm("m", [replica]))
    batcher = gateway.batcher("m")
    (link,) = gateway.run(lambda: list(batcher.links.values()))
    connection = link._heartbeat
    gateway.run(lambda: threading.Event().wait(0.5))
    gateway.until(lambda: connection.missed == 0)
    gateway.until(lambda: connection.missed == 1)
    assert link.up
    assert link._heartbeat is connection
