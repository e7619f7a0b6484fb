"""Shutdown: what is in flight is answered, nothing new is taken, and nothing is left behind."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from serving.errors import ClusterError
from serving.gateway import turns
from tests.gateway.client import Client, body, get, head, infer, post
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import VECTOR

DRAIN_S = 0.3
# Given to clients to take their last errors, and for a loaded machine.
MORE_S = 2.5
# asyncio's own loop can tell which timers are left; `Gateway.stop` asserts that none are.
LOOPS: dict[str, Callable[[], Any]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


@pytest.fixture(params=LOOPS.values(), ids=LOOPS.keys())
def short(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """A gateway that drains for `DRAIN_S`."""
    with Gateway(request.param, drain_s=DRAIN_S) as gateway:
        yield gateway


def holds(client: Client, replica: Replica, *, behind: bytes = b"") -> None:
    replica.backend.gate.clear()
    client.send(infer("m", 1), behind)
    eventually(lambda: replica.backend.running)


def refused(gateway: Gateway) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", gateway.port), 1):
            return False
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # it was closed meanwhile


def test_requests_in_flight_are_answered(short: Gateway, replica: Replica) -> None:
    short.publish(arm("m", [replica]))
    with short.connect() as client, short.connect() as idle:
        assert idle.ask(get("/v2/health/live")).status == 200
        holds(client, replica, behind=infer("m", 2) + get("/v2/health/live"))
        short.begin_stop()
        eventually(lambda: refused(short))
        replica.backend.gate.set()
        assert client.reply().values == [2, 2]
        # uvicorn lets the last request it has read be the last of the connection.
        assert client.reply().values == [4, 4]
        assert client.reply().headers["connection"] == "close"
        assert client.closed()
        assert idle.closed()
        short.wait_stopped()
    assert short.controller.reports[-1]["models"][0]["requests"] == {"success": 2}


def test_a_request_on_its_way_when_the_end_begins_is_answered(
    short: Gateway, replica: Replica
) -> None:
    short.publish(arm("m", [replica]))
    with short.connect() as client:
        assert client.ask(infer("m", 11)).values == [22, 22]
        short.begin_stop()
        assert client.ask(infer("m", 12)).values == [24, 24]
        assert client.closed()
        short.wait_stopped()


def test_a_request_on_its_way_to_an_idle_connection_is_answered(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "FAREWELL_S", 10.0)
    with Gateway(drain_s=20.0) as gateway:
        gateway.publish(arm("m", [replica]))
        with gateway.connect() as first, gateway.connect() as second, gateway.connect() as new:
            for client in (first, second):
                assert client.ask(infer("m", 1)).status == 200
            gateway.connection(new)
            gateway.begin_stop()
            eventually(lambda: refused(gateway))
            for client in (first, new):
                reply = client.ask(infer("m", 1))
                assert reply.values == [2, 2]
                assert reply.headers["connection"] == "close"
                assert client.closed()
            assert second.ask(get("/v2/health/live")).headers["connection"] == "close"
            assert second.closed()
            gateway.wait_stopped()


def test_a_hung_replica_does_not_hold_up_the_end(short: Gateway, replica: Replica) -> None:
    short.publish(arm("m", [replica], max_size=1))
    with short.connect() as client, short.connect() as other, short.connect() as third:
        holds(client, replica)
        for waiting in (other, third):
            waiting.send(infer("m", 2))
        batcher = short.batcher("m")
        short.until(lambda: batcher.in_flight + batcher.queue_depth == 3)
        started = time.monotonic()
        short.begin_stop()
        for waiting in (client, other, third):
            reply = waiting.reply()
            assert reply.status == 503
            assert "shutting down" in reply.error
            assert waiting.closed()
        short.wait_stopped()
        assert DRAIN_S <= time.monotonic() - started < DRAIN_S + MORE_S


CLIENTS = {
    "in mid-head": b"POST /v2",
    "in mid-body": infer("m", 1)[:-1],
    "in mid-body of another route": post("/v2/repository/index", b"{}")[:-1],
    "waiting to be told to continue": head(
        "POST", "/v2/models/m/infer", "Content-Length: 9", "Expect: 100-continue"
    ),
    "refused and still sending": head("POST", "/v2/models/m/infer", "Content-Length: 999999999"),
}


@pytest.mark.parametrize("sent", CLIENTS.values(), ids=CLIENTS.keys())
def test_a_client_that_does_not_finish_does_not_hold_up_the_end(
    short: Gateway, replica: Replica, sent: bytes
) -> None:
    short.publish(arm("m", [replica]))
    with short.connect() as client:
        client.send(sent)
        connection = short.connection(client)
        short.until(lambda: connection._receiving)
        started = time.monotonic()
        short.begin_stop()
        short.wait_stopped()
        assert time.monotonic() - started < DRAIN_S + MORE_S


def test_a_client_that_does_not_read_does_not_hold_up_the_end(
    short: Gateway, replica: Replica
) -> None:
    short.publish(arm("m", [replica]))
    with short.connect(receive_buffer=4096) as client:
        connection = short.connection(client)
        sock = connection.transport.get_extra_info("socket")
        short.run(lambda: sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096))
        client.send(get("/v2/models/m") * 1000)
        short.until(lambda: connection.transport.get_write_buffer_size() > 0)
        started = time.monotonic()
        short.begin_stop()
        short.wait_stopped()
        assert time.monotonic() - started < DRAIN_S + MORE_S


def test_nothing_is_left_of_a_gateway_whose_replicas_are_away(
    short: Gateway, replica: Replica
) -> None:
    """Timers of holds and delays, and tasks that connect, end with it."""
    replica.stop()
    arms = [
        arm("m", [replica], queue_hold_s=600),
        arm("n", [], of=VECTOR, queue_hold_s=600),
    ]
    short.publish(*arms, ready=False)
    for model in ("m", "n"):
        client = short.connect()
        client.send(infer(model, 1))
        batcher = short.batcher(model)
        short.until(lambda b=batcher: b.queue_depth == 1)
        client.reset()
        short.until(lambda b=batcher: b.queue_depth == 0)
    short.stop()


def test_nothing_is_left_of_a_delayed_batch(short: Gateway, replica: Replica) -> None:
    short.publish(arm("m", [replica], max_delay_s=600))
    with short.connect() as client:
        client.send(infer("m", 1))
        short.until(lambda: short.batcher("m").queue_depth == 1)
        short.begin_stop()
        assert client.reply().status == 503
        short.wait_stopped()


def test_stop_without_a_controller(short: Gateway, replica: Replica) -> None:
    short.publish(arm("m", [replica]))
    short.controller.away = True
    with short.connect() as client:
        assert client.ask(infer("m", 1)).status == 200
    short.stop()


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_a_port_that_is_taken(loop: Callable[[], Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gateway = Gateway(loop)
        gateway.config = gateway.config.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(ClusterError, match=r"cannot listen on 127\.0\.0\.1:"):
            gateway.start()


def test_a_request_pipelined_during_the_drain(short: Gateway, replica: Replica) -> None:
    """What was announced as the last reply is the last."""
    short.publish(arm("m", [replica]))
    with short.connect() as client:
        holds(client, replica)
        short.begin_stop()
        eventually(lambda: refused(short))
        connection = short.connection(client)
        short.until(lambda: not connection.active.keep_alive)
        client.send(post("/v2/models/m/infer", body(5)))
        short.until(lambda: connection.pipeline)
        replica.backend.gate.set()
        reply = client.reply()
        assert reply.values == [2, 2]
        assert reply.headers["connection"] == "close"
        assert client.closed()
        short.wait_stopped()
    assert replica.backend.seen == [1]
