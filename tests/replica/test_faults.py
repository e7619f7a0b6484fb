"""What runtimes write when memory is short or a GPU breaks, and what becomes of it."""

from __future__ import annotations

import pytest

from serving.replica.backends import faults
from serving.replica.backends.faults import FatalDeviceError, MemoryExhausted, meaning

ORT = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. "
ARENA = "Status Message: bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t) "


@pytest.fixture
def working_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "context_fault", lambda: None)


@pytest.mark.usefixtures("working_context")
@pytest.mark.parametrize(
    ("text", "requested"),
    [
        (
            f"{ORT}{ARENA}Failed to allocate memory for requested buffer of size 17592186044416\n",
            17592186044416,
        ),
        (f"{ORT}{ARENA}Available memory of 1024 is smaller than requested bytes of 4096", 4096),
        (f"{ORT}Status Message: std::bad_alloc", None),
        (f"{ORT}CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; expr=cudaMalloc", None),
        (f"{ORT}CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", None),
        (f"{ORT}CUBLAS failure 3: the resource allocation failed ; GPU=0", None),
        (f"{ORT}CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", None),
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB",
            5 << 29,
        ),
        ("CUDA out of memory. Tried to allocate 512 bytes. GPU 0 has", 512),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 281474976710656 bytes. Error code 12",
            281474976710656,
        ),
    ],
)
def test_memory_that_ran_out_is_no_failure_of_the_model(text: str, requested: int | None) -> None:
    found = meaning(RuntimeError(text), "cuda:0")
    assert isinstance(found, MemoryExhausted)
    assert found.requested_bytes == requested


@pytest.mark.usefixtures("working_context")
@pytest.mark.parametrize("search", ["GET", "FIND"])
def test_a_convolution_without_an_engine_is_short_of_memory_if_torch_refused_some(
    search: str,
) -> None:
    error = RuntimeError(f"{search} was unable to find an engine to execute this computation")
    assert isinstance(meaning(error, "cuda:0", refused=True), MemoryExhausted)
    assert meaning(error, "cuda:0", refused=False) is None
    assert meaning(RuntimeError("the model's own error"), "cuda:0", refused=True) is None


@pytest.mark.usefixtures("working_context")
@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        f"{ORT}CUBLAS failure 1: the library was not initialized ; GPU=0 ; expr=cublasCreate(&h_)",
        f"{ORT}CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED ; GPU=0 ; expr=cudnnCreate(&h_)",
    ],
)
def test_a_library_that_does_not_start_on_a_full_gpu_is_short_of_memory(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(faults, "free_bytes", lambda: 20 << 20)
    assert isinstance(meaning(RuntimeError(text), "cuda:0"), MemoryExhausted)
    assert meaning(RuntimeError(text), "cpu") is None
    for free in (20 << 30, None):
        monkeypatch.setattr(faults, "free_bytes", lambda free=free: free)
        assert meaning(RuntimeError(text), "cuda:0") is None


@pytest.mark.usefixtures("working_context")
@pytest.mark.parametrize(
    "text",
    [
        f"{ORT}CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=h",
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: misaligned address",
        "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript\n"
        "RuntimeError: CUDA error: an illegal memory access was encountered\n",
    ],
)
def test_an_error_that_cuda_will_repeat_for_ever_is_fatal(text: str) -> None:
    found = meaning(RuntimeError(text), "cuda:0")
    assert isinstance(found, FatalDeviceError)
    assert str(found).startswith("cuda:0 can run nothing more in this process: ")
    assert "\n" not in str(found)
    # A CPU has no context that could break, whatever a model writes into its errors.
    assert meaning(RuntimeError(text), "cpu") is None


def test_whatever_the_runtime_says_a_context_that_is_broken_is_fatal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faults, "context_fault", lambda: "an illegal instruction (CUDA error 715)")
    found = meaning(RuntimeError("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED"), "cuda:0")
    assert isinstance(found, FatalDeviceError)
    assert str(found).endswith("in this process: an illegal instruction (CUDA error 715)")


@pytest.mark.usefixtures("working_context")
@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: invalid configuration argument",
        "CUDA error: no kernel image is available for execution on the device",
        "indices element out of data bounds, idx=99 must be within the inclusive range [-5,4]",
        "a misaligned address in the customer's own words",
        "",
    ],
)
def test_what_cuda_forgets_by_the_next_call_is_the_models_failure(text: str) -> None:
    assert meaning(RuntimeError(text), "cuda:0") is None


def test_python_that_runs_out_of_memory_counts_too() -> None:
    found = meaning(MemoryError(), "cpu")
    assert isinstance(found, MemoryExhausted)
    assert found.requested_bytes is None
