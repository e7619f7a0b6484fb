"""Bounds on a connection: bytes of heads and bodies, time, and memory for a reader too slow."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from serving.gateway import front, turns
from tests.gateway.client import Client, Reply, body, chunked, get, head, infer, last, post, tensor
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import ScriptedBackend, build

M = "/v2/models/m/infer"
INDEX = "/v2/repository/index"
HEAD_BYTES = 8 << 10
BODY_BYTES = 1 << 20
READ_S = 0.5
WRITE_S = 0.3
KEEP_ALIVE_S = 1.0
LINGER_S = 0.3
SWEEP_S = 0.05
# For a loaded machine.
LATE_S = 1.5


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="module")
def strict(
    sockets: Path, backend: ScriptedBackend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """Tight bounds; m is under control, wide is as large as its request."""
    bounds = {
        "max_header_bytes": HEAD_BYTES,
        "max_body_bytes": BODY_BYTES,
        "read_timeout_s": READ_S,
        "write_timeout_s": WRITE_S,
        "keep_alive_s": KEEP_ALIVE_S,
    }
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(turns, "LINGER_S", LINGER_S)
        for module in (turns, front):
            patch.setattr(module, "SWEEP_S", SWEEP_S)
        gateway = stack.enter_context(Gateway(**bounds))
        m = Replica(backend, sockets, "limits-m")
        wide = Replica(build("wide", tmp_path_factory.mktemp("wide")), sockets, "limits-wide")
        for replica in (m, wide):
            stack.callback(replica.stop)
        gateway.publish(arm("m", [m]), arm("wide", [wide]))
        yield gateway


@contextlib.contextmanager
def in_flight(gateway: Gateway, backend: ScriptedBackend, client: Client) -> Iterator[None]:
    """`client` has a request at the model, which answers when the block ends."""
    backend.gate.clear()
    try:
        client.send(infer("m", 1))
        eventually(lambda: backend.running, "a run")
        yield
    finally:
        backend.gate.set()


HEADS = {
    "one header": head("POST", M, "X: " + "a" * HEAD_BYTES),
    "many headers": head("POST", M, *(f"X-{i}: a" for i in range(2000))),
    "target": head("POST", M + "?" + "a" * HEAD_BYTES),
    "target of another route": head("GET", "/v2/health/live?" + "a" * HEAD_BYTES),
    "a header that does not end": b"POST /v2 HTTP/1.1\r\nX: " + b"a" * 500_000,
    "headers that do not end": b"POST /v2 HTTP/1.1\r\n" + b"X: a\r\n" * 100_000,
    "a target that does not end": b"GET /" + b"a" * 500_000,
    "a method with no end of blank lines": b"\r\n" * 10_000,
    "trailers that do not end": chunked(M, [body(1)])[:-2] + b"X: a\r\n" * 100_000,
    "a trailer that does not end": chunked(M, [body(1)])[:-2] + b"X: " + b"a" * 500_000,
    "a chunk extension that does not end": chunked(M, [b"{"])[:-5] + b"1;x=" + b"a" * 500_000,
}


@pytest.mark.parametrize("request_", HEADS.values(), ids=HEADS.keys())
def test_an_oversized_head(strict: Gateway, request_: bytes) -> None:
    with strict.connect() as client:
        assert client.ask(infer("m", 1)).status == 200
        # The client sends all it has before it reads: the reply must survive that.
        reply = client.ask(request_)
        assert reply.status == 431
        assert str(HEAD_BYTES) in reply.error
        assert client.closed()


def test_a_head_of_the_largest_size_is_served(strict: Gateway) -> None:
    with strict.connect() as client:
        size = HEAD_BYTES - 300
        assert client.ask(infer("m", 1, headers=["X: " + "a" * size])).status == 200
        assert client.ask(head("GET", "/v2/health/live", "X: " + "a" * size)).status == 200


OVERSIZED = {
    "by length": lambda target: (
        head("POST", target, f"Content-Length: {3 * BODY_BYTES}") + bytes(3 * BODY_BYTES)
    ),
    "by chunks": lambda target: chunked(target, [bytes(50_000)] * 60),
    "by one chunk": lambda target: chunked(target, [bytes(3 * BODY_BYTES)]),
}


@pytest.mark.parametrize("target", [M, INDEX])
@pytest.mark.parametrize("make", OVERSIZED.values(), ids=OVERSIZED.keys())
def test_an_oversized_body(strict: Gateway, target: str, make: Callable[[str], bytes]) -> None:
    with strict.connect() as client:
        assert client.ask(infer("m", 1)).status == 200
        reply = client.ask(make(target))
        assert reply.status == 413
        assert str(BODY_BYTES) in reply.error
        assert client.closed()


@pytest.mark.parametrize("target", [M, INDEX])
@pytest.mark.parametrize("make", OVERSIZED.values(), ids=OVERSIZED.keys())
def test_an_oversized_body_behind_a_request_in_flight(
    strict: Gateway, backend: ScriptedBackend, target: str, make: Callable[[str], bytes]
) -> None:
    with strict.connect() as client:
        # The gateway stops reading behind the request in flight.
        sender = threading.Thread(target=client.send, args=(make(target),))
        with in_flight(strict, backend, client):
            sender.start()
            connection = strict.connection(client)
            strict.until(lambda: connection.pipeline)
        assert client.reply().values == [2, 2]
        assert client.reply().status == 413
        sender.join()
        assert client.closed()


def test_a_body_of_the_largest_size_is_served(strict: Gateway) -> None:
    data = body(1)
    data += b" " * (BODY_BYTES - len(data))
    with strict.connect() as client:
        assert client.ask(post(M, data)).status == 200
        assert client.ask(chunked(M, [data[:100], data[100:]])).status == 200


def test_a_body_in_tiny_chunks_is_not_kept_in_tiny_objects(
    strict: Gateway, backend: ScriptedBackend
) -> None:
    data = body(1) + b" " * 50_000
    chunks = [data[i : i + 2] for i in range(0, len(data), 2)]
    with strict.connect() as client:
        whole = chunked(M, chunks)
        client.send(whole[:-5])
        connection = strict.connection(client)
        exchange = strict.until(lambda: connection.incoming)
        strict.until(lambda: len(exchange.body) == len(data))
        assert isinstance(exchange.body, bytearray)
        assert client.ask(whole[-5:]).values == [2, 2]


SLOW = {
    "request line": b"POST /v2/mod",
    "head": head("POST", M, "Content-Length: 9")[:-1],
    "head of another route": get("/v2/health/live")[:-3],
    "body": infer("m", 1)[:-1],
    "body of another route": post(INDEX, b"{}")[:-1],
    "chunk": chunked(M, [body(1)])[:-5],
    "body after 100 Continue": head("POST", M, "Content-Length: 9", "Expect: 100-continue"),
}


@pytest.mark.parametrize("request_", SLOW.values(), ids=SLOW.keys())
def test_a_request_that_does_not_arrive(strict: Gateway, request_: bytes) -> None:
    with strict.connect() as client:
        started = time.monotonic()
        reply = client.ask(request_)
        if reply.status == 100:
            reply = client.reply()
        assert READ_S < time.monotonic() - started < READ_S + LATE_S
        assert reply.status == 408
        assert reply.error
        assert client.closed()


def test_a_request_that_arrives_one_byte_at_a_time_for_ever(strict: Gateway) -> None:
    with strict.connect() as head_client, strict.connect() as body_client:
        clients = {c.sock: c for c in (head_client, body_client)}
        body_client.send(head("POST", M, "Content-Length: 100000"))
        head_client.send(b"GET /")
        started = time.monotonic()
        open_ = set(clients)
        while open_:
            assert time.monotonic() - started < READ_S + LATE_S
            readable, _, _ = select.select(open_, [], [], 0.02)
            for sock in readable:
                assert clients[sock].reply().status == 408
                assert clients[sock].closed()
            open_ -= set(readable)
            for sock in open_:
                clients[sock].send(b"a")


def test_a_slow_second_request_does_not_harm_the_first(
    strict: Gateway, backend: ScriptedBackend
) -> None:
    with strict.connect() as client:
        with in_flight(strict, backend, client):
            client.send(infer("m", 2)[:-1])
            connection = strict.connection(client)
            strict.until(lambda: connection.pipeline)
            began = connection._since
            # The clock of the second one starts when its turn comes.
            strict.until(lambda: strict.server.front.clock > began + READ_S)
        assert client.reply().values == [2, 2]
        assert client.reply().status == 408


@pytest.mark.parametrize("before", [b"", infer("m", 1), get("/v2/health/live"), b"\r\n"])
def test_an_idle_connection_is_closed_without_a_word(strict: Gateway, before: bytes) -> None:
    with strict.connect() as client:
        started = time.monotonic()
        if before.strip():
            assert client.ask(before).status == 200
        else:
            client.send(before)
        assert client.closed()
        assert KEEP_ALIVE_S < time.monotonic() - started < KEEP_ALIVE_S + LATE_S


def wide(values: int, *headers: str) -> bytes:
    """A request whose answer is about as large: `values` numbers of 5 characters."""
    data = {"inputs": [tensor("x", [[12.5] * values])]}
    return post("/v2/models/wide/infer", json.dumps(data).encode(), *headers)


def shrink(gateway: Gateway, client: Client) -> None:
    """Make the kernel hold little of what the gateway and this client send to each other."""
    connection = gateway.connection(client)
    sock = connection.transport.get_extra_info("socket")
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    for option, size in ((socket.SO_SNDBUF, 4096), (socket.SO_RCVBUF, 1 << 16)):
        gateway.run(lambda o=option, s=size: sock.setsockopt(socket.SOL_SOCKET, o, s))


def test_a_reader_too_slow_for_its_replies(gateway: Gateway, run_dir: Path, tmp_path: Path) -> None:
    """It is not read from while it does not read: few requests wait, one reply is buffered."""
    replica = Replica(build("wide", tmp_path), run_dir)
    gateway.publish(arm("wide", [replica]))
    one = wide(12_000)
    count = 60
    with gateway.connect(receive_buffer=4096) as client:
        shrink(gateway, client)
        connection = gateway.connection(client)
        sender = threading.Thread(target=client.send, args=(one * count,))
        sender.start()
        # With both directions paused nothing more can pile up.
        gateway.until(lambda: connection.flow.write_paused and connection.flow.read_paused)
        buffered = gateway.run(connection.transport.get_write_buffer_size)
        # A write is let in below the high-water mark of 64 KiB.
        assert buffered < len(one) + 66_000
        waiting = gateway.run(lambda: sum(len(c.body) for c, _ in connection.pipeline))
        assert waiting < 2 * 256_000
        assert sender.is_alive()
        replies = [client.reply() for _ in range(count)]
        sender.join()
        assert {r.status for r in replies} == {200}
        assert {v for r in replies for v in r.values} == {-12.5}
    replica.stop()


def test_many_small_requests_do_not_pile_up(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica]))
    count = 8_000
    replica.backend.gate.clear()
    with gateway.connect() as client:
        client.send(infer("m", 1))
        eventually(lambda: replica.backend.running)
        connection = gateway.connection(client)
        sender = threading.Thread(target=client.send, args=(get("/v2/health/live") * count,))
        sender.start()
        gateway.until(lambda: connection.flow.read_paused)
        # One read brings at most 256 KiB.
        assert len(connection.pipeline) * len(get("/v2/health/live")) < 300_000
        replica.backend.gate.set()
        assert client.reply().values == [2, 2]
        assert {client.reply().status for _ in range(count)} == {200}
        sender.join()


def refuses_to_read(gateway: Gateway, client: Client, request_: bytes) -> None:
    """The gateway drops the connection, not long after `WRITE_S` (and an idle time before it)."""
    shrink(gateway, client)
    connection = gateway.connection(client)
    client.send(request_)
    gateway.until(lambda: connection.transport.get_write_buffer_size() > 0)
    started = time.monotonic()
    gateway.until(lambda: connection not in gateway.server.front.connections)
    assert time.monotonic() - started < WRITE_S + KEEP_ALIVE_S + LATE_S


@pytest.mark.parametrize("values", [100_000, 9_000])
@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
def test_a_client_that_never_reads_is_dropped(
    strict: Gateway, values: int, headers: tuple[str, ...]
) -> None:
    """Whether its reply is beyond the transport's high-water mark or not."""
    with strict.connect(receive_buffer=4096) as client:
        refuses_to_read(strict, client, wide(values, *headers))


def test_a_refused_client_that_never_closes_is_dropped(strict: Gateway) -> None:
    with strict.connect() as client:
        client.send(head("POST", M, f"Content-Length: {BODY_BYTES + 1}"))
        connection = strict.connection(client)
        assert client.reply().status == 413
        strict.until(lambda: connection not in strict.server.front.connections)


def test_a_refused_request_counts(strict: Gateway) -> None:
    unrouted = strict.server.front.unrouted
    before = dict(unrouted)
    with strict.connect() as client:
        client.ask(infer("nowhere", 1))
        client.ask(head("GET", "/" + "a" * HEAD_BYTES))
    with strict.connect() as client:
        client.ask(b"nonsense\r\n\r\n")
    for slug in ("not_found", "headers_too_large", "invalid_request"):
        assert unrouted[slug] == before.get(slug, 0) + 1
    counted = strict.outcomes("m").get("payload_too_large", 0)
    with strict.connect() as client:
        reply: Reply = client.ask(head("POST", M, f"Content-Length: {BODY_BYTES + 1}"))
        assert reply.status == 413
    assert strict.outcomes("m")["payload_too_large"] == counted + 1


def test_the_last_chunk_may_be_late(strict: Gateway) -> None:
    whole = chunked(M, [body(4)])
    with strict.connect() as client:
        client.send(whole[: -len(last())])
        connection = strict.connection(client)
        strict.until(lambda: connection.incoming)
        assert client.ask(last()).values == [8, 8]
