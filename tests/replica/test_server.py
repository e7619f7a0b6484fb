"""The frame server with a real model behind a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from serving.artifacts import ONNX_PLATFORM
from serving.core import frames
from serving.core.frames import Kind
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.base import Backend
from serving.replica.server import ReplicaServer

from . import models
from .client import Client, Failed, infer_frame
from .conftest import IDENTITY, Gate, Serve, wait_until

Result = tuple[list[np.ndarray], tuple[int, ...]]


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


def test_a_batch_goes_there_and_back(serve: Serve, linear_backend: Backend) -> None:
    server = serve(linear_backend)
    with Client.unix(server.unix_path) as client:
        assert client.hello == IDENTITY
        x = rows(3)
        outputs, head = client.infer_with_head(x)
        np.testing.assert_allclose(outputs[0], x @ models.LINEAR_W, rtol=1e-5)
        _, n, run_rows, _, compute_us = head
        assert (n, run_rows) == (3, 3)
        assert 0 <= compute_us < 10_000_000


def test_the_socket_is_private_and_replaces_a_stale_one(
    serve: Serve, linear_backend: Backend, run_dir: Path
) -> None:
    run_dir.mkdir(mode=0o755)
    server = serve(linear_backend)
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    server.stop()
    assert not Path(server.unix_path).exists()
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(server.unix_path)
    left_behind.close()
    successor = ReplicaServer(server.engine, server.unix_path, IDENTITY)
    successor.start()
    with Client.unix(server.unix_path) as client:
        assert len(client.infer(rows(1))[0]) == 1
    successor.stop()


def test_large_batches_cross_in_pieces(serve: Serve, linear_backend: Backend) -> None:
    server = serve(linear_backend, max_size=1 << 20)
    with Client.unix(server.unix_path) as client:
        for n in (300_000, 1, 300_000):
            x = rows(n)
            np.testing.assert_allclose(
                client.infer(x)[0], x @ models.LINEAR_W, rtol=1e-4, atol=1e-4
            )


def test_a_frame_may_arrive_byte_by_byte(serve: Serve, linear_backend: Backend) -> None:
    server = serve(linear_backend)
    with Client.unix(server.unix_path) as client:
        x = rows(2)
        client.batch_id = 7
        for byte in infer_frame(7, 2, (x,)):
            client.sock.sendall(bytes([byte]))
        np.testing.assert_allclose(client.read_result()[0][0], x @ models.LINEAR_W, rtol=1e-5)


def test_frames_sent_ahead_are_answered_in_order(serve: Serve, linear_backend: Backend) -> None:
    server = serve(linear_backend)
    with Client.unix(server.unix_path) as client:
        batches = [rows(n, seed=n) for n in (1, 5, 2, 64)]
        client.sock.sendall(b"".join(infer_frame(i, len(x), (x,)) for i, x in enumerate(batches)))
        for i, x in enumerate(batches):
            client.batch_id = i
            np.testing.assert_allclose(client.read_result()[0][0], x @ models.LINEAR_W, rtol=1e-4)


def test_heartbeats_tell_how_long_the_run_has_lasted(serve: Serve, linear_backend: Backend) -> None:
    gate = Gate(linear_backend)
    server = serve(gate)
    with (
        Client.unix(server.unix_path, "heartbeat") as heart,
        Client.unix(server.unix_path) as client,
    ):
        assert heart.ping() == 0
        client.send_infer(rows(1))
        assert gate.entered.acquire(timeout=30)
        first = heart.ping()
        wait_until(lambda: heart.ping() > first, "the stall has grown")
        gate.open()
        client.read_result()
        assert heart.ping() == 0


class Senders:
    """Clients that send at once, each with its own connection and thread."""

    def __init__(self, path: str, pool: ThreadPoolExecutor) -> None:
        self.path, self.pool = path, pool

    def send(self, x: np.ndarray, budget_us: int = 0) -> Future[Result]:
        def run() -> Result:
            with Client.unix(self.path) as client:
                return client.infer_with_head(x, budget_us=budget_us)

        return self.pool.submit(run)


@pytest.fixture
def pool() -> ThreadPoolExecutor:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def test_waiting_batches_run_as_one(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate, max_size=10)
    senders = Senders(server.unix_path, pool)
    first = senders.send(rows(1))
    assert gate.entered.acquire(timeout=30)
    batches = [rows(n, seed=n) for n in (2, 3, 4)]
    waiting = []
    for i, x in enumerate(batches):
        waiting.append(senders.send(x))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    assert first.result(30)[1][2] == 1
    for x, sent in zip(batches, waiting, strict=True):
        outputs, head = sent.result(30)
        np.testing.assert_allclose(outputs[0], x @ models.LINEAR_W, rtol=1e-4)
        assert head[1:3] == (len(x), 9)
        assert head[3] > 0
    assert gate.batches == [1, 9]


def test_a_merged_run_stays_within_the_limit_and_the_rest_follows(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate, max_size=4)
    senders = Senders(server.unix_path, pool)
    sent = [senders.send(rows(1))]
    assert gate.entered.acquire(timeout=30)
    for i, n in enumerate((3, 3, 1)):
        sent.append(senders.send(rows(n, seed=n)))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    assert [len(s.result(30)[0][0]) for s in sent] == [1, 3, 3, 1]
    # The second batch of three did not fit, the single row behind it did.
    assert gate.batches == [1, 4, 3]


def test_batches_of_other_shapes_never_meet(
    serve: Serve, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    model = models.identity(tmp_path / "m.onnx", TensorProto.FLOAT, ("batch", "width"))
    signature = models.identity_signature("FP32", (-1, -1))
    gate = Gate(models.cpu_backend(model, ONNX_PLATFORM, signature))
    server = serve(gate)
    senders = Senders(server.unix_path, pool)
    arrays = [np.full((1, w), w, np.float32) for w in (2, 3, 2, 3, 4)]
    sent = [senders.send(arrays[0])]
    assert gate.entered.acquire(timeout=30)
    for i, x in enumerate(arrays[1:]):
        sent.append(senders.send(x))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    for x, future in zip(arrays, sent, strict=True):
        np.testing.assert_array_equal(future.result(30)[0][0], x)
    assert sorted(gate.batches) == [1, 1, 1, 2]


def test_an_expired_batch_never_reaches_the_model(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate)
    senders = Senders(server.unix_path, pool)
    first = senders.send(rows(1))
    assert gate.entered.acquire(timeout=30)
    expired = senders.send(rows(2), budget_us=1)
    wait_until(lambda: server.engine.waiting == 1, "the batch waits")
    patient = senders.send(rows(3), budget_us=60_000_000)
    wait_until(lambda: server.engine.waiting == 2, "the batch waits")
    gate.open()
    first.result(30)
    with pytest.raises(Failed) as failed:
        expired.result(30)
    assert failed.value.slug == "deadline_exceeded"
    assert len(patient.result(30)[0][0]) == 3
    assert gate.batches == [1, 3]


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_only_the_guilty_part_of_a_batch_fails(
    serve: Serve, tmp_path: Path, pool: ThreadPoolExecutor, guilty: int
) -> None:
    model = models.gather(tmp_path / "m.onnx")
    gate = Gate(models.cpu_backend(model, ONNX_PLATFORM, models.GATHER))
    server = serve(gate)
    senders = Senders(server.unix_path, pool)
    first = senders.send(np.array([0]))
    assert gate.entered.acquire(timeout=30)
    indices = [np.array([1, 2]), np.array([3]), np.array([4, 0, 1])]
    indices[guilty] = np.array([99])
    sent = []
    for i, x in enumerate(indices):
        sent.append(senders.send(x))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    first.result(30)
    for i, (x, future) in enumerate(zip(indices, sent, strict=True)):
        if i != guilty:
            np.testing.assert_array_equal(future.result(30)[0][0], models.GATHER_TABLE[x])
            continue
        with pytest.raises(Failed, match=r"model_failed: the model failed: .*99") as failed:
            future.result(30)
        assert "\n" not in failed.value.message


def test_a_client_that_left_hurts_nobody_it_was_merged_with(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate)
    senders = Senders(server.unix_path, pool)
    first = senders.send(rows(1))
    assert gate.entered.acquire(timeout=30)
    leaver = Client.unix(server.unix_path)
    leaver.send_infer(rows(2))
    wait_until(lambda: server.engine.waiting == 1, "the batch waits")
    x = rows(3, seed=3)
    mate = senders.send(x)
    wait_until(lambda: server.engine.waiting == 2, "the batch waits")
    leaver.sock.close()
    gate.open()
    first.result(30)
    outputs, head = mate.result(30)
    np.testing.assert_allclose(outputs[0], x @ models.LINEAR_W, rtol=1e-4)
    assert head[2] == 5


def test_many_connections_at_once_each_get_their_own_answer(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    server = serve(linear_backend, max_size=16, buckets=(1, 4, 16))

    def hammer(seed: int) -> int:
        rng = np.random.default_rng(seed)
        with Client.unix(server.unix_path) as client:
            for _ in range(100):
                x = rng.normal(size=(int(rng.integers(1, 9)), 4)).astype(np.float32)
                outputs, head = client.infer_with_head(x)
                np.testing.assert_allclose(outputs[0], x @ models.LINEAR_W, rtol=1e-3, atol=1e-4)
                assert head[2] in (1, 4, 16)
                assert head[2] >= len(x)
        return 100

    assert sum(pool.map(hammer, range(16))) == 1600
    wait_until(lambda: server.engine.idle_s > 0, "the engine is idle")
    assert server.drain(30)


def test_a_wrong_number_of_rows_is_the_models_fault(serve: Serve, tmp_path: Path) -> None:
    backend = models.cpu_backend(
        models.halves_rows(tmp_path / "m.onnx"), ONNX_PLATFORM, models.identity_signature("FP32")
    )
    server = serve(backend)
    with Client.unix(server.unix_path) as client:
        with pytest.raises(Failed, match="output 'y' came back with 2 rows for a batch of 4"):
            client.infer(np.ones((4, 2), np.float32))
        # One row is half of one row, rounded up: this model is right about that.
        assert len(client.infer(np.ones((1, 2), np.float32))[0]) == 1


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((np.ones((2, 5), np.float32),), {}, r"input 'x' has shape \[2, 5\], .* takes \[-1, 4\]"),
        ((np.ones((2, 4)),), {}, "input 'x' is FP64, the model takes FP32"),
        ((np.ones(4, np.float32),), {"rows": 1}, r"input 'x' has shape \[4\]"),
        ((np.ones((2, 4), np.float32),), {"rows": 3}, "input 'x' has 2 rows in a batch of 3"),
        ((np.ones((0, 4), np.float32),), {}, "a batch of 0 rows"),
        ((np.ones((65, 4), np.float32),), {}, "a batch of 65 rows; this model takes at most 64"),
        ((np.ones((1, 4), np.float32),) * 2, {}, "2 inputs that are not the model's 1"),
        ((), {"rows": 1}, "0 inputs that are not the model's 1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_the_connection_lives(
    serve: Serve,
    linear_backend: Backend,
    arrays: tuple[np.ndarray, ...],
    options: dict[str, int],
    message: str,
) -> None:
    server = serve(linear_backend)
    with Client.unix(server.unix_path) as client:
        with pytest.raises(Failed, match=message) as failed:
            client.infer(*arrays, **options)
        assert failed.value.slug == "invalid_request"
        assert len(client.infer(rows(2))[0]) == 2


def hello(role: str = "data") -> bytes:
    return frames.encode_json(Kind.HELLO, {"role": role, "gateway": "g"})


@pytest.mark.parametrize(
    "first",
    [
        infer_frame(1, 1, (np.ones((1, 4), np.float32),)),
        frames.encode_json(Kind.HELLO, {"role": "admin"}),
        frames.encode_prefix(Kind.HELLO, 0, 3, 0) + b"{}}",
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        struct.pack("<BBHIQ", Kind.HELLO, 9, 0, 0, 0),
        frames.encode_prefix(Kind.HELLO, 0, 1 << 19, 0),
    ],
)
def test_a_bad_handshake_is_refused(serve: Serve, linear_backend: Backend, first: bytes) -> None:
    server = serve(linear_backend)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.unix_path)
        sock.settimeout(30)
        sock.sendall(first)
        answer = read_all(sock)
    kind, _, meta, _ = frames.decode_prefix(answer)
    assert kind is Kind.REFUSED
    assert frames.decode_json(answer[16 : 16 + meta])["error"]
    with Client.unix(server.unix_path) as client:
        assert len(client.infer(rows(1))[0]) == 1


@pytest.mark.parametrize(
    ("role", "frame"),
    [
        ("data", frames.encode_prefix(Kind.PING, 0, 0, 0)),
        ("heartbeat", infer_frame(1, 1, (np.ones((1, 4), np.float32),))),
        ("data", frames.encode_prefix(Kind.INFER, 0, 8, 0) + bytes(8)),
        ("data", frames.encode_prefix(Kind.INFER, 1, 24, 0) + bytes(24)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 40, 0) + bytes(40)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 1 << 21, 0)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 24, 1 << 40)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 24, 8) + bytes(32)),
    ],
)
def test_a_malformed_frame_closes_its_connection_only(
    serve: Serve, linear_backend: Backend, role: str, frame: bytes
) -> None:
    server = serve(linear_backend)
    with Client.unix(server.unix_path) as other, Client.unix(server.unix_path, role) as bad:
        bad.sock.sendall(frame)
        assert read_all(bad.sock) == b""
        assert len(other.infer(rows(2))[0]) == 2


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            data += part
    return data


GOOD = infer_frame(5, 2, (np.ones((2, 4), np.float32),))


@st.composite
def damaged_frames(draw: st.DrawFn) -> bytes:
    """Random bytes, or a good frame with some bytes changed, removed or added."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    frame = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frame) - 1))
        frame[at] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(frame)))
    return bytes(frame[: draw(st.sampled_from([cut, len(frame)]))] + draw(st.binary(max_size=8)))


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(damaged_frames())
def test_damaged_frames_never_hurt_others(
    serve: Serve, linear_backend: Backend, frame: bytes
) -> None:
    server = _shared_server(serve, linear_backend)
    with Client.unix(server.unix_path) as bad:
        bad.sock.sendall(frame)
        bad.sock.shutdown(socket.SHUT_WR)
        answer = read_all(bad.sock)
    if answer:
        # Whatever was answered is a whole frame of a kind that answers INFER.
        kind, _, meta, payload = frames.decode_prefix(answer)
        assert kind in (Kind.RESULT, Kind.FAILED)
        assert len(answer) >= frames.PREFIX.size + meta + payload
    with Client.unix(server.unix_path) as good:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(good.infer(x)[0], x @ models.LINEAR_W, rtol=1e-5)


def _shared_server(serve: Serve, backend: Backend) -> object:
    """One server for all examples of a property: `serve` is one object for the whole test."""
    if not hasattr(serve, "shared"):
        serve.shared = serve(backend)  # type: ignore[attr-defined]
    return serve.shared  # type: ignore[attr-defined]


def test_buckets_pad_and_trim(serve: Serve, linear_backend: Backend) -> None:
    gate = Gate(linear_backend)
    gate.open()
    server = serve(gate, max_size=8, buckets=(2, 8))
    with Client.unix(server.unix_path) as client:
        for n, padded in ((1, 2), (2, 2), (3, 8), (8, 8)):
            x = rows(n)
            outputs, head = client.infer_with_head(x)
            np.testing.assert_allclose(outputs[0], x @ models.LINEAR_W, rtol=1e-4)
            assert head[1:3] == (n, padded)
    assert gate.batches == [2, 2, 8, 8]


def test_a_graph_with_frozen_rows_is_padded_up_to_them(serve: Serve, tmp_path: Path) -> None:
    signature = Signature(models.LINEAR.inputs, models.LINEAR.outputs, Batch.FIXED, fixed_rows=4)
    backend = models.cpu_backend(
        models.linear(tmp_path / "m.onnx", rows=4), ONNX_PLATFORM, signature
    )
    server = serve(backend)
    with Client.unix(server.unix_path) as client:
        for n in (1, 3, 4):
            x = rows(n)
            outputs, head = client.infer_with_head(x)
            np.testing.assert_allclose(outputs[0], x @ models.LINEAR_W, rtol=1e-4)
            assert head[1:3] == (n, 4)
        with pytest.raises(Failed, match="a batch of 5 rows; this model takes at most 4"):
            client.infer(rows(5))


def test_a_model_without_rows_runs_each_request_alone(
    serve: Serve, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),), Batch.NONE
    )
    gate = Gate(
        models.cpu_backend(models.rows_depend(tmp_path / "m.onnx"), ONNX_PLATFORM, signature)
    )
    server = serve(gate)

    def send(x: np.ndarray) -> np.ndarray:
        with Client.unix(server.unix_path) as client:
            return client.infer(x, rows=1)[0]

    arrays = [np.ones((n, 2), np.float32) for n in (4, 4, 5)]
    sent = [pool.submit(send, arrays[0])]
    assert gate.entered.acquire(timeout=30)
    for i, x in enumerate(arrays[1:]):
        sent.append(pool.submit(send, x))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    for x, future in zip(arrays, sent, strict=True):
        np.testing.assert_allclose(future.result(30), 1 / len(x), rtol=1e-5)
    assert gate.batches == [4, 4, 5]


def test_an_empty_tensor_crosses(serve: Serve, tmp_path: Path) -> None:
    model = models.identity(tmp_path / "m.onnx", TensorProto.FLOAT, ("batch", "width"))
    backend = models.cpu_backend(model, ONNX_PLATFORM, models.identity_signature("FP32", (-1, -1)))
    with Client.unix(serve(backend).unix_path) as client:
        assert client.infer(np.empty((3, 0), np.float32))[0].shape == (3, 0)


def test_stop_ends_connections_and_drain_waits_for_the_batch(
    serve: Serve, linear_backend: Backend
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate)
    with Client.unix(server.unix_path) as client:
        client.send_infer(rows(1))
        assert gate.entered.acquire(timeout=30)
        assert not server.drain(0.05)
        gate.open()
        assert server.drain(30)
        assert len(client.read_result()[0][0]) == 1
        assert server.listening
        server.stop()
        assert client.sock.recv(1) == b""
    wait_until(lambda: not server.listening, "the listeners have ended")
    with pytest.raises(OSError, match="No such file"):
        Client.unix(server.unix_path)


def test_threads_and_descriptors_of_closed_connections_are_freed(
    serve: Serve, linear_backend: Backend
) -> None:
    server = serve(linear_backend)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Client.unix(server.unix_path) as client:
            client.infer(rows(1))
    wait_until(lambda: threading.active_count() <= threads, "the threads have ended")
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors are free")
