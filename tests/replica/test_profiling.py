"""Loading with a lease, and what a warm-up measures, with a GPU behind the ports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.core.replica import GpuLease
from serving.errors import ArtifactError, DeviceError
from serving.replica import loading
from serving.replica.backends.base import Backend, RuntimeOptions, allocator_limit, does_not_fit
from serving.replica.backends.faults import FatalDeviceError
from serving.replica.engine import Engine, Usage
from serving.replica.loading import load_engine
from serving.replica.profiling import profiled_warm_up
from serving.replica.rules import BatchRules

from .fakes import BREAKS, MIB, VECTOR, FakeGpu, FakeMeter
from .test_golden import Bundle

SAMPLE = [np.ones((2, 4), np.float32)]
LEASE = GpuLease("l1", "GPU-7", 2 << 30, 80 << 30)


def measured_gpu(per_row: int = 10 * MIB, first_run: int = 50 * MIB) -> FakeGpu:
    """A model of 200 MiB whose runs take `per_row` bytes a row, and 50 MiB once."""
    meter = FakeMeter(limit_bytes=2 << 30)
    gpu = FakeGpu(meter=meter)
    meter.fixed_bytes += 200 * MIB

    def allocate(x: np.ndarray) -> None:
        if len(gpu.shapes) == 1:
            meter.fixed_bytes += first_run
        meter.cached_bytes = max(meter.cached_bytes, per_row * len(x))

    gpu.on_run = allocate
    return gpu


def test_a_warm_up_measures_weights_workspace_and_the_peak_of_each_bucket() -> None:
    gpu = measured_gpu()
    profile = profiled_warm_up(Engine(gpu, BatchRules(8, (1, 4, 8))), SAMPLE)
    assert profile is not None
    assert (profile.device_type, profile.runtime) == ("Fake GPU", "test")
    assert profile.weights_bytes == 200 * MIB
    assert profile.workspace_bytes == (300 + 50) * MIB
    assert profile.buckets == {1: 10 * MIB, 4: 40 * MIB, 8: 80 * MIB}
    assert profile.need(8) == (200 + 350 + 80) * MIB
    assert gpu.tried == [1, 1, 4, 8]


def test_a_replica_that_holds_more_than_its_lease_after_warm_up_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu = measured_gpu()
    profiled_warm_up(Engine(gpu, BatchRules(8, (1, 4, 8))), SAMPLE)
    assert not caplog.records
    gpu = measured_gpu()
    gpu.meter.limit_bytes = 629 * MIB
    profiled_warm_up(Engine(gpu, BatchRules(8, (1, 4, 8))), SAMPLE)
    assert caplog.messages == [
        "after its warm-up this replica holds 630 MiB of Fake GPU, and may hold 629 MiB: give the "
        "model more (gpu_memory_bytes), or raise gpu.safety_margin"
    ]


def test_the_profile_ends_where_memory_does() -> None:
    gpu = measured_gpu()
    gpu.capacity = 4 * 16
    engine = Engine(gpu, BatchRules(16, (1, 4, 8, 16)))
    profile = profiled_warm_up(engine, SAMPLE)
    assert profile is not None
    assert profile.buckets == {1: 10 * MIB, 4: 40 * MIB}
    assert engine.ceiling == 4
    assert 16 not in gpu.tried, "what is larger than a run that did not fit is not tried"


def test_a_model_of_which_one_row_does_not_fit_never_becomes_ready() -> None:
    gpu = measured_gpu()
    gpu.capacity = 0
    with pytest.raises(ArtifactError, match="warm-up at 1 rows: 1 row does not fit into the mem"):
        profiled_warm_up(Engine(gpu, BatchRules(8, (1, 8))), SAMPLE)


def test_a_gpu_that_breaks_during_warm_up_is_told_from_a_model_that_fails() -> None:
    with pytest.raises(FatalDeviceError, match="an illegal access"):
        profiled_warm_up(
            Engine(measured_gpu(), BatchRules(8)), [np.full((1, 4), BREAKS, np.float32)]
        )


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    bundle = Bundle(tmp_path / "bundle", tmp_path / "home")
    yield bundle
    for path in bundle.home.rglob("*"):
        path.chmod(0o700)


@pytest.fixture
def loaded_with(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RuntimeOptions, str | None]]:
    """The options of each load, and the GPU that was visible then. What loads is a fake GPU."""
    seen: list[tuple[RuntimeOptions, str | None]] = []

    def load(directory: Path, options: RuntimeOptions) -> Backend:
        seen.append((options, os.environ.get("CUDA_VISIBLE_DEVICES")))
        return FakeGpu(4 * 16, VECTOR, FakeMeter(options.memory_limit_bytes))

    monkeypatch.setattr(loading, "load_backend", load)
    monkeypatch.setattr(loading, "check_golden", lambda engine, bundle: None)
    # Put back as it was after the test, whatever the load makes of it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    return seen


def test_a_lease_decides_the_gpu_before_a_runtime_is_loaded(
    bundle: Bundle, loaded_with: list[tuple[RuntimeOptions, str | None]]
) -> None:
    load_engine(bundle.spec(device="auto"), bundle.fetch, LEASE)
    load_engine(bundle.spec(device="cuda"), bundle.fetch, LEASE)
    for options, visible in loaded_with:
        assert visible == "GPU-7"
        # Who was given a GPU must not end up on the CPU.
        assert options.device == "cuda"
        assert options.memory_limit_bytes == 2 << 30


def test_without_a_lease_nothing_is_capped_or_chosen(
    bundle: Bundle, loaded_with: list[tuple[RuntimeOptions, str | None]]
) -> None:
    load_engine(bundle.spec(device="auto"), bundle.fetch)
    assert loaded_with == [(RuntimeOptions("auto"), "before")]


@pytest.mark.usefixtures("loaded_with")
def test_what_ran_out_in_the_warm_up_is_no_batch_of_anybody(bundle: Bundle) -> None:
    loaded = load_engine(bundle.spec(max_size=16, buckets=(4, 16)), bundle.fetch, LEASE)
    assert loaded.profile is not None
    assert list(loaded.profile.buckets) == [4]
    assert (loaded.engine.ceiling, loaded.engine.oom_batches) == (4, 0)
    assert loaded.engine.usage == Usage(0, 0, 0)


@pytest.mark.usefixtures("loaded_with")
def test_a_ceiling_that_the_lease_knows_is_not_tried_again(bundle: Bundle) -> None:
    lease = GpuLease("l1", "GPU-7", 2 << 30, 80 << 30, ceiling=2)
    loaded = load_engine(bundle.spec(max_size=16, buckets=(1, 2, 4, 16)), bundle.fetch, lease)
    backend = loaded.engine.backend
    assert isinstance(backend, FakeGpu)
    assert max(backend.tried) == 2
    assert loaded.profile is not None
    assert list(loaded.profile.buckets) == [1, 2]


def test_a_lease_survives_json() -> None:
    assert GpuLease.from_dict(LEASE.to_dict()) == LEASE
    with pytest.raises(TypeError, match="colour"):
        GpuLease.from_dict({**LEASE.to_dict(), "colour": 1})


def test_a_limit_counts_the_context_and_must_leave_something() -> None:
    assert allocator_limit(FakeMeter()) is None
    assert allocator_limit(FakeMeter(limit_bytes=301 * MIB)) == MIB
    with pytest.raises(DeviceError, match="CUDA's context alone takes 314572800: give the model"):
        allocator_limit(FakeMeter(limit_bytes=300 * MIB))


def test_weights_that_do_not_fit_are_named_with_the_numbers() -> None:
    error = does_not_fit(Path("m.onnx"), FakeMeter(limit_bytes=10), 20)
    assert str(error) == (
        "m.onnx: does not fit into the memory of Fake GPU (GPU-0), of which it may hold 10 bytes "
        "(20 bytes more were asked for): give it more (gpu_memory_bytes), a larger GPU or a "
        "smaller dtype"
    )
