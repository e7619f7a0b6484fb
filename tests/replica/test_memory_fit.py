"""Batches that do not fit into memory: run in parts, remembered, and told where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from serving.artifacts import ONNX_PLATFORM, TORCHSCRIPT_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import OutOfMemory
from serving.replica.backends.base import Backend
from serving.replica.backends.faults import MemoryExhausted
from serving.replica.ceiling import NO_LIMIT, Ceiling
from serving.replica.engine import Engine, Usage
from serving.replica.rules import BatchRules
from serving.replica.work import Work

from . import models
from .client import Client, Failed
from .conftest import Gate, Serve, wait_until
from .fakes import VECTOR, FakeGpu, FakeMeter

ROW = 4 * 4  # bytes of a row of four FP32


def rows(n: int, width: int = 4) -> np.ndarray:
    return np.arange(n * width, dtype=np.float32).reshape(n, width)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_a_batch_that_does_not_fit_is_run_in_halves_and_never_tried_again(serve: Serve) -> None:
    gpu = FakeGpu(4 * ROW)
    server = serve(gpu, max_size=16, buckets=(1, 2, 4, 8, 16))
    with Client.unix(server.unix_path) as client:
        assert server.engine.ceiling is None
        outputs, head = client.infer_with_head(rows(15))
        np.testing.assert_array_equal(outputs[0], rows(15) * 2)
        assert gpu.tried == [16, 8, 4, 4, 4, 4]
        assert head[1:3] == (15, 16)
        assert (server.engine.ceiling, server.engine.oom_batches) == (4, 1)
        gpu.shapes.clear()
        np.testing.assert_array_equal(client.infer(rows(9))[0], rows(9) * 2)
        assert gpu.tried == [4, 4, 1]
        np.testing.assert_array_equal(client.infer(rows(3))[0], rows(3) * 2)
        assert gpu.tried == [4, 4, 1, 4]
    assert server.engine.oom_batches == 1


def test_batches_are_merged_up_to_what_fits(serve: Serve, pool: ThreadPoolExecutor) -> None:
    gpu = FakeGpu(4 * ROW)
    gate = Gate(gpu)
    server = serve(gate, max_size=16)
    gate.open(3)

    def send(x: np.ndarray) -> np.ndarray:
        with Client.unix(server.unix_path) as client:
            return client.infer(x)[0]

    send(rows(8))
    assert gpu.tried == [8, 4, 4]
    sent = [pool.submit(send, rows(1))]
    wait_until(lambda: gate.batches[-1:] == [1], "the first runs")
    for i, n in enumerate((2, 2, 2)):
        sent.append(pool.submit(send, rows(n)))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    for future, n in zip(sent, (1, 2, 2, 2), strict=True):
        np.testing.assert_array_equal(future.result(30), rows(n) * 2)
    assert gpu.tried[3:] == [1, 4, 2]


def test_a_merged_run_that_does_not_fit_answers_each_of_its_batches(
    serve: Serve, pool: ThreadPoolExecutor
) -> None:
    gate = Gate(FakeGpu(4 * ROW))
    server = serve(gate, max_size=16)

    def send(x: np.ndarray) -> np.ndarray:
        with Client.unix(server.unix_path) as client:
            return client.infer(x)[0]

    sent = [pool.submit(send, rows(1))]
    assert gate.entered.acquire(timeout=30)
    batches = [rows(n) + n for n in (3, 1, 5)]
    for i, x in enumerate(batches):
        sent.append(pool.submit(send, x))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    sent[0].result(30)
    for x, future in zip(batches, sent[1:], strict=True):
        np.testing.assert_array_equal(future.result(30), x * 2)
    assert gate.batches == [1, 16, 8, 4, 4, 1]
    assert (server.engine.ceiling, server.engine.oom_batches) == (4, 1)


def test_one_row_that_does_not_fit_is_a_clear_error_of_its_own(
    serve: Serve, pool: ThreadPoolExecutor
) -> None:
    wide = Signature(VECTOR.inputs, VECTOR.outputs, Batch.DYNAMIC)
    gpu = FakeGpu(ROW, wide, FakeMeter(limit_bytes=10_000))

    def only_odd_values_are_large(x: np.ndarray) -> None:
        gpu.capacity = 0 if (x == 7).any() else np.inf

    gpu.on_run = only_odd_values_are_large
    gate = Gate(gpu)
    server = serve(gate)

    def send(x: np.ndarray) -> np.ndarray:
        with Client.unix(server.unix_path) as client:
            return client.infer(x)[0]

    sent = [pool.submit(send, np.ones((1, 4), np.float32))]
    assert gate.entered.acquire(timeout=30)
    for i, value in enumerate((5, 7, 6)):
        sent.append(pool.submit(send, np.full((1, 4), value, np.float32)))
        wait_until(lambda i=i: server.engine.waiting == i + 1, "the batch waits")
    gate.open()
    for future, value in zip(sent, (1, 5, 7, 6), strict=True):
        if value != 7:
            np.testing.assert_array_equal(future.result(30), np.full((1, 4), 2 * value))
            continue
        with pytest.raises(Failed) as failed:
            future.result(30)
        assert failed.value.slug == "out_of_memory"
        assert failed.value.message == (
            "1 row does not fit into the memory of cuda:0 (16 bytes more were asked for) of which "
            "this replica may hold 10000 bytes: send smaller inputs, or give the model more of a "
            "GPU (gpu_memory_bytes) or a smaller dtype"
        )
    assert server.engine.oom_batches == 1


def test_rows_that_are_too_large_put_no_limit_on_smaller_ones(serve: Serve) -> None:
    gpu = FakeGpu(16 * ROW)
    server = serve(gpu, max_size=16)
    with Client.unix(server.unix_path) as client:
        with pytest.raises(Failed, match="out_of_memory: 1 row does not fit"):
            client.infer(rows(8, width=100))
        gpu.shapes.clear()
        np.testing.assert_array_equal(client.infer(rows(16))[0], rows(16) * 2)
        assert gpu.shapes == [(16, 4)]
        # Between the two, what was learned of the smaller rows does not hold for these.
        np.testing.assert_array_equal(client.infer(rows(4, width=16))[0], rows(4, width=16) * 2)
        assert gpu.shapes == [(16, 4), (4, 16)]
        with pytest.raises(Failed, match="out_of_memory"):
            client.infer(rows(8, width=100))
        assert gpu.shapes[2:] == [(1, 100)]


def test_the_smallest_bucket_is_no_reason_to_fail(serve: Serve) -> None:
    gpu = FakeGpu(3 * ROW)
    server = serve(gpu, max_size=16, buckets=(8, 16))
    with Client.unix(server.unix_path) as client:
        np.testing.assert_array_equal(client.infer(rows(5))[0], rows(5) * 2)
        assert gpu.tried == [8, 4, 2, 2, 1]
        np.testing.assert_array_equal(client.infer(rows(2))[0], rows(2) * 2)
        assert gpu.tried == [8, 4, 2, 2, 1, 2]


@pytest.mark.parametrize(
    ("signature", "n", "sentence"),
    [
        (
            Signature(
                (TensorSpec("x", "FP32", (8, 4)),),
                (TensorSpec("y", "FP32", (8, 4)),),
                Batch.FIXED,
            ),
            3,
            "8 rows do not fit into the memory of cuda:0 and this model takes no fewer",
        ),
        (
            Signature(
                (TensorSpec("x", "FP32", (4, 4)),), (TensorSpec("y", "FP32", (4, 4)),), Batch.NONE
            ),
            1,
            "1 row does not fit into the memory of cuda:0 and this model takes no fewer",
        ),
    ],
)
def test_a_model_that_takes_no_fewer_rows_fails_at_once(
    signature: Signature, n: int, sentence: str
) -> None:
    gpu = FakeGpu(ROW, signature)
    rules = BatchRules(8, (8,)) if signature.batch is Batch.FIXED else BatchRules(1)
    engine = Engine(gpu, rules, ceiling=2)
    work = Work([rows(n if signature.batch is Batch.FIXED else 4)], n, arrived=0.0)
    engine.submit(work)
    assert isinstance(work.error, OutOfMemory)
    assert str(work.error).startswith(sentence)
    assert len(gpu.shapes) == 1


def test_a_ceiling_known_from_before_holds_from_the_first_batch() -> None:
    gpu = FakeGpu(4 * ROW)
    engine = Engine(gpu, BatchRules(16), ceiling=4)
    work = Work([rows(10)], 10, arrived=0.0)
    engine.submit(work)
    np.testing.assert_array_equal(work.outputs[0], rows(10) * 2)
    assert gpu.tried == [4, 4, 2]
    assert (engine.ceiling, engine.oom_batches, work.run_rows) == (4, 0, 10)


def test_memory_of_the_host_that_runs_out_is_treated_alike() -> None:
    gpu = FakeGpu()

    def no_memory(x: np.ndarray) -> None:
        if len(x) > 2:
            raise MemoryError

    gpu.on_run = no_memory
    engine = Engine(gpu, BatchRules(8))
    work = Work([rows(4)], 4, arrived=0.0)
    engine.submit(work)
    np.testing.assert_array_equal(work.outputs[0], rows(4) * 2)
    assert engine.ceiling == 2


def told_ns(work: Work) -> int:
    """The run's time as the result tells it: in whole microseconds."""
    return int(work.compute_s * 1e6) * 1000


def test_usage_tells_answers_padding_and_failures_apart() -> None:
    gpu = FakeGpu(4 * ROW)
    engine = Engine(gpu, BatchRules(8, (4, 8)))
    work = Work([rows(2)], 2, arrived=0.0)
    engine.submit(work)
    used = engine.usage
    assert used.answered_ns + used.padding_ns == pytest.approx(told_ns(work), abs=2)
    assert used.padding_ns == pytest.approx(told_ns(work) / 2, abs=2)
    assert used.failed_ns == 0
    engine.warmed_up()
    assert engine.usage == Usage(0, 0, 0)
    split = Work([rows(7)], 7, arrived=0.0)
    engine.submit(split)
    assert (gpu.tried, split.run_rows) == ([4, 8, 4, 4], 8)
    assert engine.usage.padding_ns == pytest.approx(told_ns(split) / 8, abs=2)
    assert engine.usage.answered_ns == pytest.approx(told_ns(split) * 7 / 8, abs=2)
    # The run that did not fit is in nobody's answer.
    assert engine.usage.failed_ns > 0
    before = engine.usage
    gpu.capacity = 0
    engine.submit(Work([rows(3)], 3, arrived=0.0))
    after = engine.usage
    assert (after.answered_ns, after.padding_ns) == (before.answered_ns, before.padding_ns)
    assert after.failed_ns > before.failed_ns


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(1, 40),
    buckets=st.none() | st.lists(st.integers(1, 24), min_size=1, unique=True).map(sorted),
    batches=st.lists(
        st.tuples(st.integers(1, 24), st.sampled_from([1, 3, 60])), min_size=1, max_size=12
    ),
)
def test_whatever_fits_is_answered_and_nothing_is_tried_twice(
    capacity: int, buckets: list[int] | None, batches: list[tuple[int, int]]
) -> None:
    gpu = FakeGpu(4 * capacity)
    engine = Engine(gpu, BatchRules(24, tuple(buckets) if buckets else None))
    for n, width in batches:
        x = rows(n, width)
        work = Work([x], n, arrived=0.0)
        engine.submit(work)
        if width <= capacity:
            assert work.error is None
            np.testing.assert_array_equal(work.outputs[0], x * 2)
        else:
            assert isinstance(work.error, OutOfMemory)
    failed = [s for s in gpu.shapes if s[0] * s[1] > capacity and s[0] > 1]
    # Of runs with at least as many, at least as large rows, one failure is enough.
    for i, (n, width) in enumerate(failed):
        assert not any(n >= known[0] and width >= known[1] for known in failed[:i])


def test_a_ceiling_keeps_only_what_says_something() -> None:
    ceiling = Ceiling()
    assert ceiling.lowest == ceiling.rows(10) == NO_LIMIT
    ceiling.lower(100, 4)
    assert (ceiling.rows(99), ceiling.rows(100), ceiling.rows(1000)) == (NO_LIMIT, 4, 4)
    ceiling.lower(100, 2)
    ceiling.lower(10, 8)
    assert [ceiling.rows(b) for b in (9, 10, 99, 100)] == [NO_LIMIT, 8, 8, 2]
    ceiling.lower(10, 1)
    assert (ceiling.rows(1000), ceiling.lowest, ceiling.rows(9)) == (1, 1, NO_LIMIT)


class Greedy(torch.nn.Module):
    """y = 2x, with scratch memory of n⁸ numbers for n rows: 0.5 MB for 4, a petabyte for 64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squared = x.size(0) * x.size(0)
        fourth = squared * squared
        scratch = torch.empty([fourth * fourth])
        return x * 2 + float(scratch.numel()) * 0


def greedy_torch(directory: Path) -> Backend:
    model = models.script(directory / "m.ts", Greedy())
    signature = models.identity_signature("FP32", (-1, 4))
    return models.cpu_backend(model, TORCHSCRIPT_PLATFORM, signature)


def greedy_onnx(directory: Path) -> Backend:
    """The same in ONNX: ConstantOfShape makes n × n⁷ numbers."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Mul", ["n", "n"], ["n2"]),
        helper.make_node("Mul", ["n2", "n2"], ["n4"]),
        helper.make_node("Mul", ["n4", "n4"], ["n8"]),
        helper.make_node("ConstantOfShape", ["n8"], ["scratch"]),
        helper.make_node("ReduceMax", ["scratch"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "x"], ["double"]),
        helper.make_node("Add", ["double", "zero"], ["y"]),
    ]
    shape = ["batch", 4]
    model = models.save_onnx(
        directory / "m.onnx",
        nodes,
        [("x", TensorProto.FLOAT, shape)],
        [("y", TensorProto.FLOAT, shape)],
    )
    return models.cpu_backend(model, ONNX_PLATFORM, models.identity_signature("FP32", (-1, 4)))


def test_an_arena_that_cannot_be_shrunk_costs_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = greedy_onnx(tmp_path)
    # There is no arena of a GPU here: ONNX Runtime refuses each run after which it is to shrink it.
    backend.device = "cuda:0"
    for _ in range(2):
        with pytest.raises(MemoryExhausted):
            backend.run([rows(64)])
        np.testing.assert_array_equal(backend.run([rows(4)])[0], rows(4) * 2)
    assert caplog.messages == [
        "ONNX Runtime has no arena on the GPU that it could shrink: what a run has taken, this "
        "replica keeps"
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("greedy", [greedy_torch, greedy_onnx])
def test_a_runtime_that_really_runs_out_of_memory_is_understood(
    serve: Serve, tmp_path: Path, greedy: type
) -> None:
    # This machine's own memory stands in for a GPU's: the runtimes' errors are of one kind.
    server = serve(greedy(tmp_path), max_size=64, buckets=(1, 4, 64))
    with Client.unix(server.unix_path) as client:
        np.testing.assert_array_equal(client.infer(rows(10))[0], rows(10) * 2)
    assert (server.engine.ceiling, server.engine.oom_batches) == (4, 1)
