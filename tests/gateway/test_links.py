"""The connections to replicas: handshake, heartbeats, and answers that are no answers."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.core import frames
from serving.core.frames import Kind
from serving.gateway import links
from tests.gateway.client import body, infer, post
from tests.gateway.harness import DIGEST, Gateway, Replica, arm, eventually
from tests.gateway.models import ScriptedBackend, build
from tests.gateway.rogue import Answer, Rogue, result
from tests.gateway.test_batches import NEVER_S, callers, send_all

StartRogue = Callable[..., Rogue]


@pytest.fixture
def rogue(run_dir: Path) -> Iterator[StartRogue]:
    with contextlib.ExitStack() as stack:

        def start(answer: Answer, **options: object) -> Rogue:
            replica = Rogue(run_dir, answer, **options)
            stack.callback(replica.stop)
            return replica

        yield start


@pytest.fixture
def good(run_dir: Path) -> Iterator[Replica]:
    replica = Replica(ScriptedBackend(), run_dir, "good")
    yield replica
    replica.stop()


def doubled(payload: bytes) -> bytes:
    return (np.frombuffer(payload, np.float32) * 2).tobytes()


def honest(batch_id: int, rows: int, payload: bytes) -> bytes:
    return result(batch_id, rows, doubled(payload[: rows * 8]))


MALFORMED: dict[str, Answer] = {
    "noise": lambda i, rows, data: b"\xff" * 64,
    "another version": lambda i, rows, data: b"\x05\x09" + bytes(14),
    "an unknown kind": lambda i, rows, data: b"\x63\x01" + bytes(14),
    "a frame too large": lambda i, rows, data: frames.encode_prefix(Kind.RESULT, 1, 8, 1 << 40),
    "a request": lambda i, rows, data: frames.encode_prefix(Kind.INFER, 0, 0, 0),
    "a pong": lambda i, rows, data: frames.encode_prefix(Kind.PONG, 0, 8, 0) + bytes(8),
    "another welcome": lambda i, rows, data: frames.encode_json(Kind.WELCOME, {}),
    "a result without a head": lambda i, rows, data: frames.encode_prefix(Kind.RESULT, 0, 0, 0),
    "a table cut short": lambda i, rows, data: (
        frames.encode_prefix(Kind.RESULT, 9, 32, 0) + frames.RESULT_HEAD.pack(i, rows, rows, 0, 0)
    ),
    "another batch": lambda i, rows, data: result(i + 1, rows, doubled(data)),
    "a payload cut short": lambda i, rows, data: (
        frames.encode_prefix(Kind.RESULT, 0, 32, 8)
        + frames.RESULT_HEAD.pack(i, rows, rows, 0, 0)
        + bytes(8)
    ),
    "a failure that is no JSON": lambda i, rows, data: (
        frames.encode_prefix(Kind.FAILED, 0, 10, 0) + frames.BATCH_ID.pack(i) + b"{]"
    ),
    "a failure that is no object": lambda i, rows, data: (
        frames.encode_prefix(Kind.FAILED, 0, 10, 0) + frames.BATCH_ID.pack(i) + b"[]"
    ),
    "a failure cut short": lambda i, rows, data: frames.encode_prefix(Kind.FAILED, 0, 2, 0) + b"{}",
    "nothing": lambda i, rows, data: None,
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_answer_costs_its_link_only(
    gateway: Gateway, rogue: StartRogue, good: Replica, answer: Answer
) -> None:
    bad = rogue(answer)
    gateway.publish(arm("m", [bad, good]))
    batcher = gateway.batcher("m")
    with gateway.connect() as client:
        for i in range(20):
            assert client.ask(infer("m", i)).values == [2 * i, 2 * i]
            if bad.batches:
                break
        assert bad.batches == [1]
        # It comes back, and the other link was never lost.
        gateway.until(lambda: batcher.replicas_connected == 2)
        assert bad.connections >= 6
        assert client.ask(infer("m", 7)).status == 200
    assert set(gateway.outcomes("m")) == {"success"}


MISFITS = {
    "a row too few": lambda i, rows, data: result(i, rows - 1, doubled(data)[:-8]),
    "a row too few, rows as sent": lambda i, rows, data: result(
        i, rows - 1, doubled(data)[:-8], said=rows
    ),
    "no rows at all": lambda i, rows, data: result(i, rows, b"", shape=()),
    "another output": lambda i, rows, data: result(i, rows, doubled(data), index=1),
    "a width too small": lambda i, rows, data: result(
        i, rows, doubled(data)[: rows * 4], shape=(rows, 1)
    ),
    "bytes missing": lambda i, rows, data: result(i, rows, doubled(data)[:-4]),
}


@pytest.mark.parametrize("answer", MISFITS.values(), ids=MISFITS.keys())
def test_an_answer_that_does_not_fit(gateway: Gateway, rogue: StartRogue, answer: Answer) -> None:
    """A batch gets it: each member is run again alone, and answered correctly."""
    bad = rogue(lambda i, rows, data: (answer if rows > 1 else honest)(i, rows, data))
    gateway.publish(arm("m", [bad], max_size=8, max_delay_s=NEVER_S))
    with callers(gateway, 8) as clients:
        send_all(clients, list(range(8)))
        replies = [c.reply() for c in clients]
    assert bad.batches[0] == 8
    if bad.batches[1:]:
        assert bad.batches[1:] == [1] * 8
        assert [r.values[0] for r in replies] == [2 * i for i in range(8)]
    else:
        # Only the encoder could see it.
        assert {r.status for r in replies} == {500}
    assert gateway.run(lambda: gateway.batcher("m").in_flight) == 0


@pytest.mark.parametrize("answer", MISFITS.values(), ids=MISFITS.keys())
def test_an_answer_to_one_request_that_does_not_fit(
    gateway: Gateway, rogue: StartRogue, answer: Answer
) -> None:
    gateway.publish(arm("m", [rogue(answer)]))
    with gateway.connect() as client:
        for _ in range(2):
            reply = client.ask(infer("m", 1))
            assert reply.status == 500
            assert reply.error
    assert gateway.outcomes("m") == {"model_failed": 2}


WELCOMES = {
    "another digest": frames.encode_json(Kind.WELCOME, {"digest": "sha256:" + "1" * 64}),
    "no digest": frames.encode_json(Kind.WELCOME, {}),
    "a refusal": frames.encode_json(Kind.REFUSED, {"error": "not today"}),
    "no frame": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "another frame": frames.encode_prefix(Kind.PONG, 0, 8, 0) + bytes(8),
    "no JSON": frames.encode_prefix(Kind.WELCOME, 0, 2, 0) + b"{]",
}


@pytest.mark.parametrize("welcome", WELCOMES.values(), ids=WELCOMES.keys())
def test_a_replica_that_is_another(
    gateway: Gateway, rogue: StartRogue, good: Replica, welcome: bytes
) -> None:
    bad = rogue(honest, welcome=welcome)
    gateway.publish(arm("m", [bad, good]), ready=False)
    batcher = gateway.batcher("m")
    gateway.until(lambda: batcher.ready)
    with gateway.connect() as client:
        for i in range(10):
            assert client.ask(infer("m", i)).status == 200
        # It is tried again, and again refused.
        eventually(lambda: bad.connections >= 3)
    assert bad.batches == []
    assert gateway.run(lambda: batcher.replicas_connected) == 1


def test_an_unreachable_replica_is_told_of_once(
    gateway: Gateway,
    rogue: StartRogue,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links, "BACKOFF_S", (0.001, 0.001))
    bad = rogue(honest, welcome=WELCOMES["another digest"])
    with caplog.at_level(logging.WARNING, links.__name__):
        gateway.publish(arm("m", [bad]), ready=False)
        eventually(lambda: bad.connections >= 8)
    (record,) = (r for r in caplog.records if "rogue is not reachable" in r.getMessage())
    assert DIGEST in record.getMessage()
    assert "sha256:1" in record.getMessage()


def test_a_loss_with_no_time_to_wait_for_another(gateway: Gateway, rogue: StartRogue) -> None:
    lost = rogue(lambda i, rows, data: None)
    gateway.publish(arm("m", [lost], queue_hold_s=0.0))
    with gateway.connect() as client:
        reply = client.ask(infer("m", 1))
        assert reply.status == 503
        assert "no replica" in reply.error
    assert lost.batches == [1]


def test_a_failed_batch_of_the_last_replica_that_leaves(
    gateway: Gateway, rogue: StartRogue
) -> None:
    """Its requests cannot be sent again to anyone."""
    failing, fail = threading.Event(), threading.Event()

    def answer(batch_id: int, rows: int, payload: bytes) -> bytes:
        failing.set()
        fail.wait(10)
        body = {"slug": "model_failed", "message": "at last"}
        return frames.encode_json(Kind.FAILED, body, frames.BATCH_ID.pack(batch_id))

    only = rogue(answer)
    settings = {"max_size": 2, "max_delay_s": NEVER_S, "queue_hold_s": 0.1}
    gateway.publish(arm("m", [only], **settings))
    batcher = gateway.batcher("m")
    with callers(gateway, 2) as clients:
        send_all(clients, [1, 2])
        assert failing.wait(10)
        gateway.publish(arm("m", [], of=only.signature, **settings))
        gateway.until(lambda: not batcher.ready and batcher._hold is None)
        fail.set()
        assert [c.reply().status for c in clients] == [503, 503]


def test_three_missed_heartbeats(
    gateway: Gateway, rogue: StartRogue, good: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests go elsewhere, whatever its data connections are doing."""
    monkeypatch.setattr(links, "HEARTBEAT_S", 0.02)
    silent = rogue(lambda i, rows, data: b"", pongs=2)
    gateway.publish(arm("m", [silent, good]), ready=False)
    with gateway.connect() as client:

        def answered() -> bool:
            assert client.ask(infer("m", 4)).values == [8, 8]
            return bool(silent.batches)

        # It comes back each time, for as long as two heartbeats.
        eventually(answered, "a request that went to the silent replica")
    assert set(gateway.outcomes("m")) == {"success"}


def test_a_replica_that_closes_while_it_is_being_connected_to(
    gateway: Gateway, rogue: StartRogue
) -> None:
    """One of the connections is gone before the last is there."""
    gone = iter([True, True, True])

    class Fickle(Rogue):
        def _serve(self, sock) -> None:
            if self.connections <= 6 and next(gone, False):
                sock.recv(1 << 16)
                sock.sendall(self._welcome)
                sock.close()
                return
            super()._serve(sock)

    fickle = Fickle(Path(rogue(honest).endpoint.unix).parent, honest, name="fickle")
    gateway.publish(arm("m", [fickle]))
    with gateway.connect() as client:
        assert client.ask(infer("m", 4)).values == [8, 8]
    fickle.stop()


def test_large_batches_travel_whole(gateway: Gateway, run_dir: Path, tmp_path: Path) -> None:
    replica = Replica(build("wide", tmp_path), run_dir)
    gateway.publish(arm("wide", [replica]))
    row = np.arange(300_000, dtype=np.float64).tolist()
    with callers(gateway, 4) as clients:
        for i, client in enumerate(clients):
            data = body([float(i), *row], parameters={"binary_data_output": True})
            client.send(post("/v2/models/wide/infer", data))
        for i, client in enumerate(clients):
            reply = client.reply()
            at = int(reply.headers["inference-header-content-length"])
            values = np.frombuffer(reply.body[at:], np.float32)
            np.testing.assert_array_equal(values, np.array([-i, *[-v for v in row]], np.float32))
    replica.stop()
