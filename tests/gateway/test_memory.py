"""What all clients together may take: bytes of large bodies, and connections."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.gateway.client import Client, body, head, infer, post
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import ScriptedBackend

M = "/v2/models/m/infer"
HELD_BYTES = 1 << 20
# Two of these are too many; white space is as good as any data.
LARGE = body(1) + b" " * 600_000
CONNECTIONS = 3


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="module")
def tight(sockets: Path, backend: ScriptedBackend) -> Iterator[Gateway]:
    with ExitStack() as stack:
        gateway = stack.enter_context(
            Gateway(max_held_bytes=HELD_BYTES, max_connections=CONNECTIONS)
        )
        replica = Replica(backend, sockets, "memory-m")
        stack.callback(replica.stop)
        gateway.publish(arm("m", [replica]))
        yield gateway


@pytest.fixture
def first(tight: Gateway, backend: ScriptedBackend) -> Iterator[Client]:
    """A client whose large request is at the model until the gate opens."""
    backend.gate.clear()
    with tight.connect() as client:
        client.send(post(M, LARGE))
        eventually(lambda: backend.running, "a run")
        yield client
        backend.gate.set()
        eventually(lambda: held(tight) == 0, "nothing is held any more")


def held(gateway: Gateway) -> int:
    return gateway.run(lambda: gateway.server.front.held_bytes)


def refused(client: Client) -> None:
    reply = client.reply()
    assert reply.status == 503
    assert f"the {HELD_BYTES} bytes this gateway has for them" in reply.error
    assert reply.headers["retry-after"] == "1"


def test_a_large_body_beside_others_is_refused_until_they_are_answered(
    tight: Gateway, backend: ScriptedBackend, first: Client
) -> None:
    assert held(tight) == len(LARGE)
    with tight.connect() as second:
        second.send(post(M, LARGE))
        refused(second)
    with tight.connect() as small:
        small.send(infer("m", 3))
        backend.gate.set()
        assert first.reply().values == [2, 2]
        assert small.reply().values == [6, 6]
        assert small.ask(post(M, LARGE)).values == [2, 2]


def test_what_a_body_inflates_to_counts(tight: Gateway, first: Client) -> None:
    with tight.connect() as second:
        second.send(post(M, gzip.compress(LARGE), "Content-Encoding: gzip"))
        refused(second)


def test_a_client_that_leaves_is_not_counted(tight: Gateway) -> None:
    with tight.connect() as client:
        client.send(head("POST", M, f"Content-Length: {len(LARGE)}"), LARGE[:-1])
        eventually(lambda: held(tight) == len(LARGE) - 1, "the body is counted")
    eventually(lambda: held(tight) == 0, "nothing is held any more")


def test_a_body_that_is_refused_is_not_counted(tight: Gateway) -> None:
    with tight.connect() as client:
        assert client.ask(post(M, b"[" + LARGE)).status == 400
        assert held(tight) == 0
        assert client.ask(post("/v2/models/other/infer", LARGE)).status == 404
        assert held(tight) == 0


def test_a_connection_too_many_is_told_so(tight: Gateway) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(tight.connect()) for _ in range(CONNECTIONS)]
        for client in clients:
            assert client.ask(infer("m", 1)).values == [2, 2]
        with tight.connect() as late:
            reply = late.reply()
            assert reply.status == 503
            assert f"this gateway has {CONNECTIONS} client connections" in reply.error
            assert late.closed()
        assert clients[0].ask(infer("m", 1)).values == [2, 2]
        clients[1].sock.close()
        eventually(
            lambda: gateway_connections(tight) < CONNECTIONS, "the gateway notices that one left"
        )
        with tight.connect() as next_one:
            assert next_one.ask(infer("m", 2)).values == [4, 4]


def gateway_connections(gateway: Gateway) -> int:
    return gateway.run(lambda: len(gateway.server.front.connections))


def test_json_past_its_limit_is_refused_before_it_is_parsed(sockets: Path) -> None:
    limit = 1 << 20
    replica = Replica(ScriptedBackend(), sockets, "memory-json")
    with Gateway(max_json_bytes=limit) as gateway:
        gateway.publish(arm("m", [replica]))
        with gateway.connect() as client:
            at_limit = body(1).ljust(limit)
            assert client.ask(post(M, at_limit)).values == [2, 2]
            reply = client.ask(post(M, at_limit + b" "))
            assert reply.status == 413
            assert "send large tensors as binary data" in reply.error
            binary = json.dumps(
                {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32",
                             "parameters": {"binary_data_size": 8}}]}
            ).encode()  # fmt: skip
            reply = client.ask(
                post(M, binary + bytes(8), f"Inference-Header-Content-Length: {len(binary)}")
            )
            assert reply.values == [0, 0]
    replica.stop()


def test_a_body_larger_than_all_that_is_ever_held(tight: Gateway) -> None:
    with tight.connect() as client:
        reply = client.ask(post(M, body(1).ljust(HELD_BYTES + 1)))
        assert reply.status == 413
        assert "all that are ever held" in reply.error
    assert held(tight) == 0


def test_a_request_that_was_given_up_is_not_held_by_its_batch(
    tight: Gateway, backend: ScriptedBackend
) -> None:
    batcher = tight.batcher("m")
    backend.gate.clear()
    with tight.connect() as client:
        late = client.ask(post(M, LARGE, "x-request-timeout-ms: 50"))
        assert late.status == 504
    inputs = tight.run(
        lambda: [
            call.request.inputs
            for link in batcher.links.values()
            for batch in link.batches()
            for call in batch
        ]
    )
    assert inputs == [[]]
    backend.gate.set()
