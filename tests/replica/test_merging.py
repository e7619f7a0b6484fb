"""Batches from several connections: merged, kept apart, expired, failing, abandoned."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from serving.artifacts import ONNX_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.base import Backend
from serving.replica.server import ReplicaServer

from . import models
from .client import Client, Failed
from .conftest import Gate, Serve, rows, wait_until

Result = tuple[list[np.ndarray], tuple[int, ...]]


class Senders:
    """Clients that send at once, each with its own connection and thread."""

    def __init__(self, server: ReplicaServer, pool: ThreadPoolExecutor) -> None:
        self.server, self.pool = server, pool

    def send(self, x: np.ndarray, budget_us: int = 0) -> Future[Result]:
        def run() -> Result:
            with Client.unix(self.server.unix_path) as client:
                return client.infer_with_head(x, budget_us=budget_us)

        return self.pool.submit(run)

    def queue(self, x: np.ndarray, budget_us: int = 0) -> Future[Result]:
        """Send during a run; return when the batch waits for its end."""
        engine = self.server.engine
        goal = engine.waiting + 1
        sent = self.send(x, budget_us)
        wait_until(lambda: engine.waiting == goal, "the batch waits")
        return sent


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def test_waiting_batches_run_as_one(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate, max_size=10)
    senders = Senders(server, pool)
    first = senders.send(rows(1))
    assert gate.entered.acquire(timeout=30)
    batches = [rows(n, seed=n) for n in (2, 3, 4)]
    waiting = [senders.queue(x) for x in batches]
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
    senders = Senders(server, pool)
    sent = [senders.send(rows(1))]
    assert gate.entered.acquire(timeout=30)
    sent += [senders.queue(rows(n, seed=n)) for n in (3, 3, 1)]
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
    senders = Senders(server, pool)
    arrays = [np.full((1, w), w, np.float32) for w in (2, 3, 2, 3, 4)]
    sent = [senders.send(arrays[0])]
    assert gate.entered.acquire(timeout=30)
    sent += [senders.queue(x) for x in arrays[1:]]
    gate.open()
    for x, future in zip(arrays, sent, strict=True):
        np.testing.assert_array_equal(future.result(30)[0][0], x)
    assert sorted(gate.batches) == [1, 1, 1, 2]


def test_an_expired_batch_never_reaches_the_model(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate)
    senders = Senders(server, pool)
    first = senders.send(rows(1))
    assert gate.entered.acquire(timeout=30)
    expired = senders.queue(rows(2), budget_us=1)
    patient = senders.queue(rows(3), budget_us=60_000_000)
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
    senders = Senders(server, pool)
    first = senders.send(np.array([0]))
    assert gate.entered.acquire(timeout=30)
    indices = [np.array([1, 2]), np.array([3]), np.array([4, 0, 1])]
    indices[guilty] = np.array([99])
    sent = [senders.queue(x) for x in indices]
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
    senders = Senders(server, pool)
    first = senders.send(rows(1))
    assert gate.entered.acquire(timeout=30)
    leaver = Client.unix(server.unix_path)
    leaver.send_infer(rows(2))
    wait_until(lambda: server.engine.waiting == 1, "the batch waits")
    x = rows(3, seed=3)
    mate = senders.queue(x)
    leaver.sock.close()
    gate.open()
    first.result(30)
    outputs, head = mate.result(30)
    np.testing.assert_allclose(outputs[0], x @ models.LINEAR_W, rtol=1e-4)
    assert head[2] == 5


def test_a_merged_run_never_exceeds_the_largest_bucket(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate, max_size=64, buckets=(2, 4))
    senders = Senders(server, pool)
    sent = [senders.send(rows(1))]
    assert gate.entered.acquire(timeout=30)
    sent += [senders.queue(rows(n, seed=n)) for n in (3, 1, 2, 6)]
    gate.open()
    assert [len(s.result(30)[0][0]) for s in sent] == [1, 3, 1, 2, 6]
    # A single batch that is larger than every bucket runs as it is.
    assert gate.batches == [2, 4, 2, 6]


def test_an_expired_batch_takes_no_room_in_a_merged_run(
    serve: Serve, linear_backend: Backend, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(linear_backend)
    server = serve(gate, max_size=4)
    senders = Senders(server, pool)
    first = senders.send(rows(1))
    assert gate.entered.acquire(timeout=30)
    sent = [senders.queue(rows(n, seed=n), budget_us) for n, budget_us in ((1, 0), (3, 1), (3, 0))]
    gate.open()
    first.result(30)
    assert len(sent[0].result(30)[0][0]) == 1
    with pytest.raises(Failed, match="deadline_exceeded"):
        sent[1].result(30)
    assert len(sent[2].result(30)[0][0]) == 3
    assert gate.batches == [1, 4]


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
