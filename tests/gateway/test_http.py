"""HTTP/1.1 on one connection: framing, order, turns between inference and the other routes."""

from __future__ import annotations

import json
import re

import h11
import numpy as np
import pytest

from tests.gateway.client import body, chunked, get, head, infer, last, post, tensor
from tests.gateway.harness import Gateway, Replica, arm
from tests.gateway.models import RAISES, mlp_answer

M = "/v2/models/m/infer"


def test_a_connection_serves_one_request_after_another(served: Gateway) -> None:
    with served.connect() as client:
        for i in range(50):
            assert client.ask(infer("m", i)).values == [2 * i, 2 * i]


def test_answers_have_the_documented_headers(served: Gateway) -> None:
    with served.connect() as client:
        reply = client.ask(infer("m", 1, headers=["X-Request-Id: abc-1"]))
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"] == "abc-1"
    assert reply.headers["x-model-version"] == "1"
    assert reply.headers["x-model-digest"] == "sha256:" + "0" * 64
    assert reply.headers["x-arm"] == "stable"
    assert reply.headers["x-inference-cost-usd"] == "unpriced"
    assert reply.headers["date"].endswith("GMT")
    number = r"\d+\.\d{3}"
    timing = rf"queue;dur={number}, compute;dur={number}, gateway;dur={number}"
    assert re.fullmatch(timing, reply.headers["server-timing"])


def test_a_priced_model_tells_what_a_request_cost(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica], usd_per_hour=3600.0))
    with gateway.connect() as client:
        reply = client.ask(infer("m", 1))
    compute_s = float(reply.headers["server-timing"].split("compute;dur=")[1].split(",")[0]) / 1e3
    # A dollar a second; the header has the run time in whole microseconds.
    assert float(reply.headers["x-inference-cost-usd"]) == pytest.approx(compute_s, abs=2e-6)


def test_requests_without_an_id_get_different_ones(served: Gateway) -> None:
    with served.connect() as client:
        ids = {client.ask(infer("m", 1)).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


@pytest.mark.parametrize("name", ["", "a" * 129, "caf\xe9", "tab\there"])
def test_an_unusable_request_id_is_refused_and_not_echoed(served: Gateway, name: str) -> None:
    with served.connect() as client:
        reply = client.ask(infer("m", 1, headers=[f"X-Request-Id: {name}"]))
        assert reply.status == 400
        assert "x-request-id" in reply.error
        assert reply.headers["x-request-id"] not in ("", name)
        reply = client.ask(infer("m", 1, headers=[f"X-Request-Id: {name}", "Content-Encoding: br"]))
        assert reply.headers["x-request-id"] not in ("", name)


def test_pipelined_requests_are_answered_in_order(served: Gateway) -> None:
    with served.connect() as client:
        client.send(*(infer("m", i) for i in range(200)))
        assert [client.reply().values[0] for _ in range(200)] == [2 * i for i in range(200)]


def test_pipelined_kinds_of_requests_take_turns(served: Gateway) -> None:
    """Inference, Starlette routes and failures, all in flight on one connection at once."""
    parts = [
        (infer("m", 3), 200),
        (get("/v2/health/live"), 200),
        (infer("m", 4, id=7), 400),
        (get("/v2/models/m"), 200),
        (infer("nowhere", 1), 404),
        (get("/nowhere"), 404),
        (post("/v2/repository/index", b"{}"), 200),
        (infer("m", 5), 200),
        (post("/v2/health/live", b"ignored"), 405),
        (infer("m", RAISES), 500),
        (infer("m", 6), 200),
    ]
    with served.connect() as client:
        for _ in range(5):
            client.send(*(request for request, _ in parts))
            replies = [client.reply() for _ in parts]
            assert [r.status for r in replies] == [status for _, status in parts]
            assert [replies[i].values[0] for i in (0, 7, 10)] == [6, 10, 12]
            assert replies[1].json == {"live": True}
            for reply in replies:
                if reply.status >= 400:
                    assert reply.error


def test_thousands_of_pipelined_failures_are_all_answered(served: Gateway) -> None:
    """Each is answered inside the turn of the one before it: no recursion may pile up."""
    with served.connect() as client:
        client.send(infer("m", 1), *(head("POST", "/v2/models/x/infer") for _ in range(3000)))
        client.send(infer("m", 2))
        assert client.reply().values == [2, 2]
        assert {client.reply().status for _ in range(3000)} == {404}
        assert client.reply().values == [4, 4]


def test_a_request_may_arrive_byte_by_byte(served: Gateway) -> None:
    with served.connect() as client:
        for byte in infer("m", 5) + get("/v2/health/live"):
            client.send(bytes([byte]))
        assert client.reply().values == [10, 10]
        assert client.reply().status == 200


def test_chunked_bodies(served: Gateway) -> None:
    data = body(7)
    with served.connect() as client:
        for size in (1, 2, 10, len(data)):
            chunks = [data[i : i + size] for i in range(0, len(data), size)]
            assert client.ask(chunked(M, chunks)).values == [14, 14]
        extended = head("POST", M, "Transfer-Encoding: chunked")
        extended += b"%x;name=value\r\n%b\r\n" % (len(data), data) + last()
        assert client.ask(extended).values == [14, 14]
        assert client.ask(chunked("/v2/repository/index", [b"{", b"}"])).status == 200


def test_trailers_are_read_and_ignored(served: Gateway) -> None:
    trailers = b"X-Request-Id: late\r\nX-Other: 3\r\n"
    with served.connect() as client:
        reply = client.ask(chunked(M, [body(7)], trailers=trailers))
        assert reply.values == [14, 14]
        assert reply.headers["x-request-id"] != "late"
        assert client.ask(infer("m", 8)).values == [16, 16]


@pytest.mark.parametrize("target", [M, "/v2/repository/index"])
def test_expect_100_continue(served: Gateway, target: str) -> None:
    data = body(7) if target == M else b"{}"
    with served.connect() as client:
        for _ in range(2):
            expect = (f"Content-Length: {len(data)}", "Expect: 100-continue")
            assert client.ask(head("POST", target, *expect)).status == 100
            assert client.ask(data).status == 200


def test_expect_100_continue_waits_for_its_turn(served: Gateway, gateway: Gateway) -> None:
    """A pipelined request is told to continue when those before it are answered."""
    data = body(9)
    expect = head("POST", M, f"Content-Length: {len(data)}", "Expect: 100-continue")
    with served.connect() as client:
        client.send(infer("m", 1), get("/v2/health/live"), expect)
        assert [client.reply().status for _ in range(3)] == [200, 200, 100]
        assert client.ask(data, infer("m", 2)).values == [18, 18]
        assert client.reply().values == [4, 4]


def test_a_too_large_body_is_refused_without_100(served: Gateway) -> None:
    for target in (M, "/v2/repository/index"):
        with served.connect() as client:
            size = f"Content-Length: {(4 << 20) + 1}"
            assert client.ask(head("POST", target, size, "Expect: 100-continue")).status == 413
            assert client.closed()


def test_http_1_0_is_answered_and_closed(served: Gateway) -> None:
    for headers in ((), ("Connection: keep-alive",), ("Expect: 100-continue",)):
        with served.connect() as client:
            reply = client.ask(post(M, body(1), *headers, version="1.0"))
            assert reply.values == [2, 2]
            assert reply.headers["connection"] == "close"
            assert client.closed()
    with served.connect() as client:
        assert client.ask(head("GET", "/v2/health/live", version="1.0")).status == 200
        assert client.closed()


def test_nothing_after_connection_close_is_executed(served: Gateway) -> None:
    for data, version in ((body(1), "1.1"), (b"{}", "1.1"), (b"{}", "1.0")):
        before = sum(served.outcomes("m").values())
        with served.connect() as client:
            first = post(M, data, "Connection: close", version=version)
            if version == "1.0":
                first = post(M, data, "Connection: keep-alive", version=version)
            reply = client.ask(first + infer("m", 2) * 3)
            assert reply.headers["connection"] == "close"
            assert client.closed()
        assert sum(served.outcomes("m").values()) == before + 1


def test_a_client_library_sees_valid_http(served: Gateway) -> None:
    """h11 checks every byte of the replies against the grammar."""
    rng = np.random.default_rng(1)
    connection = h11.Connection(h11.CLIENT)

    def event(client) -> h11.Event:
        while (found := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(client.sock.recv(1 << 16))
        return found

    with served.connect() as client:
        for i in range(30):
            x = rng.standard_normal((1 + i % 5, 64)).astype(np.float32)
            data = json.dumps({"inputs": [tensor("x", x.tolist())]}).encode()
            framing = ("Content-Length", str(len(data)))
            if i % 2:
                framing = ("Transfer-Encoding", "chunked")
            headers = [("Host", "gateway"), framing]
            if i % 3 == 0:
                headers.append(("Expect", "100-continue"))
            request = h11.Request(method="POST", target="/v2/models/mlp/infer", headers=headers)
            client.send(connection.send(request) or b"")
            if i % 3 == 0:
                assert isinstance(event(client), h11.InformationalResponse)
            for start in range(0, len(data), 1000):
                client.send(connection.send(h11.Data(data=data[start : start + 1000])) or b"")
            client.send(connection.send(h11.EndOfMessage()) or b"")
            response = event(client)
            assert isinstance(response, h11.Response)
            assert response.status_code == 200
            received = b""
            while isinstance(found := event(client), h11.Data):
                received += found.data
            assert isinstance(found, h11.EndOfMessage)
            (output,) = json.loads(received)["outputs"]
            answer = np.reshape(output["data"], output["shape"])
            np.testing.assert_allclose(answer, mlp_answer(x), rtol=1e-5)
            connection.start_next_cycle()
