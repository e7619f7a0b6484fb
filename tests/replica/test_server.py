"""The frame server with a real model behind a real socket."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from serving.artifacts import ONNX_PLATFORM
from serving.core import frames
from serving.core.frames import Kind
from serving.core.types import Batch, Signature
from serving.replica.backends.base import Backend
from serving.replica.server import ReplicaServer

from . import models
from .client import Client, Failed, infer_frame
from .conftest import IDENTITY, Gate, Serve, rows, wait_until


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


def test_an_empty_tensor_of_an_absurd_shape_is_refused(serve: Serve, tmp_path: Path) -> None:
    model = models.identity(tmp_path / "m.onnx", TensorProto.FLOAT, ("batch", "a", "b"))
    signature = models.identity_signature("FP32", (-1, -1, -1))
    backend = models.cpu_backend(model, ONNX_PLATFORM, signature)
    entry = frames.TensorEntry(0, "FP32", (1, 0, 1 << 62), 0)
    meta = frames.INFER_HEAD.pack(1, 1, 0, 0) + frames.encode_table([entry])
    with Client.unix(serve(backend).unix_path) as client:
        client.batch_id = 1
        for _ in range(2):
            client.sock.sendall(frames.encode_prefix(Kind.INFER, 1, len(meta), 0) + meta)
            with pytest.raises(Failed, match=r"invalid_request: .*out of bounds"):
                client.read_result()


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
