"""Bytes that are no HTTP, requests made to be read in two ways, and clients that hang up."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.gateway.client import body, chunked, get, head, infer, last, post
from tests.gateway.harness import Gateway, Replica, arm, eventually

M = "/v2/models/m/infer"
INDEX = "/v2/repository/index"
HIDDEN = infer("m", 99)


def request(*lines: str, data: bytes = b"") -> bytes:
    return "\r\n".join([f"POST {M} HTTP/1.1", "Host: gateway", *lines, "", ""]).encode() + data


MALFORMED = {
    "noise": b"\x00\x01\x02\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "an HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no method": b"/v2 HTTP/1.1\r\n\r\n",
    "an unknown method": b"FETCH /v2 HTTP/1.1\r\n\r\n",
    "a lower-case method": b"get /v2 HTTP/1.1\r\n\r\n",
    "an unknown version": b"GET /v2 HTTP/1.7\r\n\r\n",
    "no version": b"GET /v2 what\r\n\r\n",
    "a relative target": b"GET v2 HTTP/1.1\r\n\r\n",
    "a space in the target": b"GET /v2 /models HTTP/1.1\r\n\r\n",
    "bytes in the target": b"GET /v2/\xff HTTP/1.1\r\n\r\n",
    "a NUL in a header": request("X: a\0b"),
    "a CR in a header": request("X: a\rY: b"),
    "a header without a colon": request("nonsense"),
    "a header without a name": request(": a"),
    "a space in a header's name": request("X Y: a"),
    "a length that is no number": request("Content-Length: ten"),
    "a negative length": request("Content-Length: -1"),
    "a length that overflows": request("Content-Length: 99999999999999999999999"),
    "no length": request("Content-Length:"),
    "a chunk size that is no number": request("Transfer-Encoding: chunked", data=b"xyz\r\n"),
    "a negative chunk size": request("Transfer-Encoding: chunked", data=b"-1\r\n"),
    "a chunk size that overflows": request("Transfer-Encoding: chunked", data=b"f" * 20 + b"\r\n"),
    "a chunk longer than it says": request("Transfer-Encoding: chunked", data=b"1\r\nabc\r\n"),
    "no host in an absolute target": b"GET http:///v2 HTTP/1.1\r\nHost: a\r\n\r\n",
}

# What a proxy in front may read as one request and the gateway as two, or the other way round.
AMBIGUOUS = {
    "length and chunks": request(
        "Content-Length: 5", "Transfer-Encoding: chunked", data=last() + HIDDEN
    ),
    "chunks and length": request(
        "Transfer-Encoding: chunked", "Content-Length: 5", data=last() + HIDDEN
    ),
    "two lengths": request("Content-Length: 2", "Content-Length: 0", data=b"{}" + HIDDEN),
    "a list of lengths": request("Content-Length: 2, 2", data=b"{}" + HIDDEN),
    "a signed length": request("Content-Length: +2", data=b"{}" + HIDDEN),
    "a hexadecimal length": request("Content-Length: 0x2", data=b"{}" + HIDDEN),
    "two encodings": request(
        "Transfer-Encoding: chunked", "Transfer-Encoding: identity", data=last() + HIDDEN
    ),
    "chunked, but not last": request("Transfer-Encoding: chunked, identity", data=last() + HIDDEN),
    "an unknown encoding": request("Transfer-Encoding: xchunked", data=last() + HIDDEN),
    "an encoding with a vertical tab": request(
        "Transfer-Encoding: \x0bchunked", data=last() + HIDDEN
    ),
    "a space before the colon": request("Transfer-Encoding : chunked", data=last() + HIDDEN),
    "a folded header": request("Transfer-Encoding:\r\n chunked", data=last() + HIDDEN),
    "bare line feeds": b"POST /v2 HTTP/1.1\nHost: a\nContent-Length: 0\n\n" + HIDDEN,
    "a bare line feed after a header": request("X: a\nContent-Length: 2", data=b"{}" + HIDDEN),
    "bare line feeds among chunks": request(
        "Transfer-Encoding: chunked", data=b"2\n{}\n0\n\n" + HIDDEN
    ),
    "a chunk size in 0x": request("Transfer-Encoding: chunked", data=b"0x0\r\n\r\n" + HIDDEN),
}


HOSTS = {
    "none": [],
    "none, absolute target": [],
    "two": ["Host: a", "Host: b"],
    "the same twice": ["Host: a", "host: a"],
    "an empty and another one": ["Host:", "Host: a"],
    "a path": ["Host: a/b"],
    "a list": ["Host: a, b"],
    "a user": ["Host: user@a"],
    "a port that is no number": ["Host: a:b"],
    "an open bracket": ["Host: [::1"],
    "a space": ["Host: a b"],
    "bytes": ["Host: \xff"],
}


@pytest.mark.parametrize("target", [M, INDEX])
@pytest.mark.parametrize("case", HOSTS)
def test_a_request_names_one_host(served: Gateway, case: str, target: str) -> None:
    """RFC 9112 section 3.2."""
    if "absolute" in case:
        target = f"http://gateway{target}"
    lines = [f"POST {target} HTTP/1.1", "Content-Length: 2", *HOSTS[case], "", "{}"]
    before = served.outcomes("m").get("success", 0)
    with served.connect() as client:
        assert client.ask(infer("m", 1)).status == 200
        reply = client.send("\r\n".join(lines).encode("latin-1"), HIDDEN).reply()
        assert reply.status == 400
        assert "Host" in reply.error
        assert client.closed()
    assert served.outcomes("m")["success"] == before + 1


def test_hosts_that_are_fine(served: Gateway) -> None:
    hosts = ["", "a", "a.example:80", "a:", "127.0.0.1:8000", "[::1]:8000", "a_b-c", "%41"]
    with served.connect() as client:
        for host in hosts:
            for target in ("/v2/health/live", "http://other/v2/health/live"):
                request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n"
                assert client.ask(request.encode()).status == 200


@pytest.mark.parametrize(("hosts", "status"), [([], 200), (["Host: a", "Host: b"], 400)])
def test_http_1_0_needs_no_host(served: Gateway, hosts: list[str], status: int) -> None:
    with served.connect() as client:
        lines = ["GET /v2/health/live HTTP/1.0", *hosts, "", ""]
        assert client.ask("\r\n".join(lines).encode()).status == status
        assert client.closed()


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_http_is_refused(served: Gateway, raw: bytes) -> None:
    with served.connect() as client:
        assert client.ask(infer("m", 1)).status == 200
        reply = client.ask(raw)
        assert reply.status in (400, 404)
        assert reply.error
        assert reply.status == 404 or client.closed()


@pytest.mark.parametrize("target", [M, INDEX])
@pytest.mark.parametrize("raw", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_can_be_read_in_two_ways_is_refused(served: Gateway, raw: bytes, target: str) -> None:
    before = served.outcomes("m").get("success", 0)
    with served.connect() as client:
        reply = client.ask(raw.replace(M.encode(), target.encode(), 1))
        assert reply.status == 400
        assert reply.error
        assert client.closed()
    assert served.outcomes("m").get("success", 0) == before


def test_garbage_behind_requests_in_flight_is_refused_in_its_turn(served: Gateway) -> None:
    with served.connect() as client:
        client.send(infer("m", 1), get("/v2/health/live"), infer("m", 2), b"nonsense\r\n\r\n")
        assert [client.reply().status for _ in range(4)] == [200, 200, 200, 400]
        assert client.closed()


def test_a_malformed_body_of_a_waiting_request_spares_the_one_in_flight(
    gateway: Gateway, replica: Replica
) -> None:
    """For Starlette, too: what is in flight is answered before the connection is closed."""
    gateway.publish(arm("m", [replica]))
    for target in (M, INDEX):
        replica.backend.gate.clear()
        with gateway.connect() as client:
            client.send(infer("m", 1), head("POST", target, "Transfer-Encoding: chunked"), b"no")
            eventually(lambda: replica.backend.running)
            replica.backend.gate.set()
            assert client.reply().values == [2, 2]
            assert client.reply().status == 400
            assert client.closed()


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.0"])
def test_an_upgrade_is_not_taken(served: Gateway, protocol: str) -> None:
    """Some clients offer HTTP/2 with their first request: it is served as it is, body and all."""
    upgrade = (f"Upgrade: {protocol}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAM")
    with served.connect() as client:
        for _ in range(3):
            client.send(
                post(M, body(1), *upgrade),
                chunked(M, [body(2)], *upgrade),
                get("/v2/health/live", *upgrade),
                post(INDEX, b'{"ready":true}', *upgrade),
                infer("m", 3),
            )
            replies = [client.reply() for _ in range(5)]
            assert {r.status for r in replies} == {200}
            assert [replies[i].values[0] for i in (0, 1, 4)] == [2, 4, 6]
        for byte in post(M, body(4), *upgrade):
            client.send(bytes([byte]))
        assert client.reply().values == [8, 8]
        assert client.ask(post(INDEX, b"[]", *upgrade)).status == 400
        client.send(get("/v2/health/live", *upgrade) * 3000)
        assert {client.reply().status for _ in range(3000)} == {200}


def test_a_half_closed_connection_is_answered(served: Gateway) -> None:
    for requests in ([infer("m", 1)], [infer("m", 1), infer("m", 2)]):
        with served.connect() as client:
            client.send(*requests).send_eof()
            for i in range(len(requests)):
                assert client.reply().values[0] == 2 * (i + 1)
            assert client.closed()
    with served.connect() as client:
        client.send(infer("m", 1), get("/v2/health/live"), infer("m", 2)).send_eof()
        assert [client.reply().status for _ in range(3)] == [200, 200, 200]
        assert client.closed()


def test_a_half_closed_connection_with_half_a_request(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica]))
    parts = (infer("m", 2)[:-5], b"POST /v2/mod", post(INDEX, b"{}")[:-1], get("/v2")[:-1])
    for part in parts:
        with gateway.connect() as client:
            client.send(part).send_eof()
            assert client.closed()
        replica.backend.gate.clear()
        with gateway.connect() as client:
            client.send(infer("m", 1))
            eventually(lambda: replica.backend.running)
            client.send(part).send_eof()
            replica.backend.gate.set()
            assert client.reply().values == [2, 2]
            assert client.closed()
    assert gateway.run(lambda: len(gateway.server.front.connections)) == 0


def test_a_connection_reset_in_mid_body(served: Gateway) -> None:
    parts = (
        infer("m", 2)[:-5],
        chunked(M, [body(1)])[:-5],
        post(INDEX, b"{}")[:-1],
        b"POST /v2/mod",
    )
    for part in parts:
        client = served.connect()
        client.send(part)
        connection = served.connection(client)
        served.until(lambda c=connection: c._receiving)
        client.reset()
        served.until(lambda c=connection: c not in served.server.front.connections)
    with served.connect() as client:
        assert client.ask(infer("m", 1)).status == 200


def test_a_connection_reset_behind_a_pipeline(gateway: Gateway, replica: Replica) -> None:
    """The request in flight is cancelled as soon as the gateway reads on; nothing else runs."""
    gateway.publish(arm("m", [replica]))
    replica.backend.gate.clear()
    client = gateway.connect()
    client.send(infer("m", 1), infer("m", 2), get("/v2/health/live"), infer("m", 3))
    connection = gateway.connection(client)
    gateway.until(lambda: len(connection.pipeline) == 3)
    client.reset()
    eventually(lambda: replica.backend.running)
    replica.backend.gate.set()
    gateway.until(lambda: connection not in gateway.server.front.connections)
    with gateway.connect() as client:
        assert client.ask(infer("m", 4)).values == [8, 8]


def test_a_connection_that_is_gone_leaves_nothing_behind(
    gateway: Gateway, replica: Replica
) -> None:
    """Without the garbage collector, which runs rarely in a gateway."""
    gateway.publish(arm("m", [replica]))
    refs = []
    gc.collect()
    gc.disable()
    try:
        for end in ("answered", "cancelled", "in mid-body", "refused"):
            replica.backend.gate.set()
            client = gateway.connect()
            connection = gateway.connection(client)
            refs.append((end, weakref.ref(connection)))
            if end == "answered":
                assert client.ask(infer("m", 1)).status == 200
            elif end == "cancelled":
                replica.backend.gate.clear()
                client.send(infer("m", 1))
                eventually(lambda: replica.backend.running)
            elif end == "in mid-body":
                client.send(infer("m", 1)[:-1])
            else:
                assert client.ask(b"nonsense\r\n\r\n").status == 400
            client.reset()
            gateway.until(lambda c=connection: c not in gateway.server.front.connections)
            del connection
            replica.backend.gate.set()
        assert gateway.until(lambda: not gateway.batcher("m").in_flight)
        gateway.until(lambda: [end for end, ref in refs if ref() is not None] == [])
    finally:
        gc.enable()
