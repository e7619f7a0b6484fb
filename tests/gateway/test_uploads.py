"""Large bodies are read past the HTTP parser, and nobody can tell."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvloop

from serving.gateway.uploads import Upload
from tests.gateway.client import Client, Reply, head, infer, post
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import LENGTHS, ScriptedBackend

M = "/v2/models/m/infer"
ROWS = np.random.default_rng(3).standard_normal((2, 120_000), dtype=np.float32)  # 960 KB
_HEAD = json.dumps(
    {
        "parameters": {"binary_data_output": True},
        "inputs": [
            {
                "name": "x",
                "shape": list(ROWS.shape),
                "datatype": "FP32",
                "parameters": {"binary_data_size": ROWS.nbytes},
            }
        ],
    }
).encode()
BODY = _HEAD + ROWS.tobytes()
LENGTH = f"Inference-Header-Content-Length: {len(_HEAD)}"
UPLOAD = post(M, BODY, LENGTH)


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(LENGTHS)


@pytest.fixture(scope="module")
def replica(sockets: Path, backend: ScriptedBackend) -> Iterator[Replica]:
    replica = Replica(backend, sockets, "uploads-m")
    yield replica
    replica.stop()


@pytest.fixture(scope="module", params=[uvloop.new_event_loop, asyncio.new_event_loop])
def gateway(request: pytest.FixtureRequest, replica: Replica) -> Iterator[Gateway]:
    with Gateway(request.param) as gateway:
        gateway.publish(arm("m", [replica]))
        yield gateway


def is_doubled(reply: Reply) -> bool:
    start = int(reply.headers["inference-header-content-length"])
    return reply.body[start:] == (ROWS * 2).tobytes()


def uploading(gateway: Gateway, client: Client) -> bool:
    transport = gateway.connection(client).transport
    return isinstance(gateway.run(transport.get_protocol), Upload)


def begin(gateway: Gateway, client: Client, sent: int) -> None:
    """Send `sent` bytes of the body, and see to it that they are read past the parser."""
    client.send(UPLOAD[: len(UPLOAD) - len(BODY) + sent])
    eventually(lambda: held(gateway) == sent, "what was sent is counted")
    assert uploading(gateway, client)


def held(gateway: Gateway) -> int:
    return gateway.run(lambda: gateway.server.front.held_bytes)


@pytest.mark.parametrize("sent", [70_000, 500_000, len(BODY) - 1])
def test_a_large_body_arrives_as_it_was_sent(gateway: Gateway, sent: int) -> None:
    with gateway.connect() as client:
        begin(gateway, client, sent)
        assert is_doubled(client.ask(BODY[sent:]))
        assert not uploading(gateway, client)
        assert client.ask(infer("m", 1)).values == [2, 2]
        assert is_doubled(client.ask(UPLOAD))


def test_what_follows_a_large_body_is_the_next_request(gateway: Gateway) -> None:
    with gateway.connect() as client:
        begin(gateway, client, 100_000)
        client.send(BODY[100_000:], infer("m", 1), UPLOAD, infer("m", 2))
        assert is_doubled(client.reply())
        assert client.reply().values == [2, 2]
        assert is_doubled(client.reply())
        assert client.reply().values == [4, 4]


def test_a_large_body_waits_for_its_turn(gateway: Gateway, backend: ScriptedBackend) -> None:
    backend.gate.clear()
    with gateway.connect() as client:
        client.send(infer("m", 1), UPLOAD[:200_000])
        eventually(lambda: backend.running, "a run")
        assert not uploading(gateway, client)
        backend.gate.set()
        assert client.reply().values == [2, 2]
        assert is_doubled(client.ask(UPLOAD[200_000:]))


def test_a_compressed_large_body(gateway: Gateway) -> None:
    with gateway.connect() as client:
        packed = post(M, gzip.compress(BODY, 1), LENGTH, "Content-Encoding: gzip")
        assert is_doubled(client.ask(packed))


def test_a_large_body_behind_100_continue(gateway: Gateway) -> None:
    with gateway.connect() as client:
        lines = (f"Content-Length: {len(BODY)}", LENGTH, "Expect: 100-continue")
        assert client.ask(head("POST", M, *lines)).status == 100
        assert is_doubled(client.ask(BODY))


def test_a_large_body_that_does_not_arrive_is_refused(replica: Replica) -> None:
    with Gateway(read_timeout_s=1) as gateway, gateway.connect() as client:
        gateway.publish(arm("m", [replica]))
        begin(gateway, client, 500_000)
        assert client.reply().status == 408
        # What comes too late is read, for the reply to arrive, and kept by nobody.
        client.send(BODY[500_000:-1])
        eventually(lambda: not uploading(gateway, client), "the parser's turn")
        assert held(gateway) == 0
        client.send(BODY[-1:])
        assert client.closed()


def test_a_client_that_closes_its_half_in_a_large_body(gateway: Gateway) -> None:
    with gateway.connect() as client:
        begin(gateway, client, 500_000)
        client.send_eof()
        assert client.closed()
    assert held(gateway) == 0


def test_a_client_that_resets_in_a_large_body(gateway: Gateway) -> None:
    client = gateway.connect()
    begin(gateway, client, 500_000)
    client.reset()
    eventually(lambda: held(gateway) == 0, "nothing is held any more")
