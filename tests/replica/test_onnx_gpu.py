"""ONNX models on a GPU, as far as that shows without one: ONNX Runtime itself runs on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from serving.errors import DeviceError
from serving.replica.backends import cuda, onnx_providers
from serving.replica.backends import onnx as backend_module
from serving.replica.backends.base import RuntimeOptions
from serving.replica.backends.onnx import OnnxBackend

from . import models
from .fakes import FakeMeter
from .test_onnx import ELEMENT_TYPES, values

no_gpu = pytest.mark.skipif(cuda.missing_cuda() is None, reason="there is a GPU here")


def say_gpu(monkeypatch: pytest.MonkeyPatch, meter: type[FakeMeter] = FakeMeter) -> None:
    """ONNX Runtime runs on the CPU here; from now on it is said to be on a GPU."""
    monkeypatch.setattr(onnx_providers, "require_cuda", lambda asked: None)
    monkeypatch.setattr(backend_module, "DriverMeter", meter)
    here = ort.InferenceSession.get_providers
    monkeypatch.setattr(
        ort.InferenceSession, "get_providers", lambda s: ["CUDAExecutionProvider", *here(s)]
    )


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_second_run_of_a_shape_takes_no_more_of_a_gpu_than_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "cuda":
        say_gpu(monkeypatch)
    sessions: list[ort.InferenceSession] = []
    opened = ort.InferenceSession.__init__

    def remember(self: ort.InferenceSession, *args: Any, **options: Any) -> None:
        sessions.append(self)
        opened(self, *args, **options)

    monkeypatch.setattr(ort.InferenceSession, "__init__", remember)
    OnnxBackend(models.linear(tmp_path / "m.onnx"), RuntimeOptions(device), models.LINEAR)
    # A pattern of a shape's allocations is one more block, taken from its second run on.
    assert sessions[0].get_session_options().enable_mem_pattern is (device == "cpu")


@no_gpu
@pytest.mark.parametrize("datatype", [d for d in ELEMENT_TYPES if d != "BYTES"])
def test_inputs_lie_in_no_memory_of_a_gpu_but_the_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datatype: str
) -> None:
    # A value that is made on a GPU by itself lies in an arena of the process, which has no limit;
    # and it cannot be made here.
    say_gpu(monkeypatch)
    model = models.identity(tmp_path / "m.onnx", ELEMENT_TYPES[datatype])
    backend = OnnxBackend(model, RuntimeOptions("cuda"), models.identity_signature(datatype))
    assert backend.device == "cuda:0"
    x = values(datatype)
    for part in (x, x[:1], x[1:], x):
        (y,) = backend.run([part])
        np.testing.assert_array_equal(y, part)
        assert y.dtype == part.dtype


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_model_whose_nodes_stay_on_the_cpu_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    # As with operators that CUDA has no kernels of: the provider is there, and nothing runs on it.
    if device == "cuda":
        say_gpu(monkeypatch)
    model = models.linear(tmp_path / "m.onnx")
    OnnxBackend(model, RuntimeOptions(device), models.LINEAR)
    said = [f"{model}: 1 of 1 nodes run on the CPU: MatMul"]
    assert caplog.messages == (said if device == "cuda" else [])


@no_gpu
@pytest.mark.parametrize(
    ("named", "chosen"),
    [
        (["tensorrt"], ["Tensorrt", "CUDA", "CPU"]),
        (["cuda"], ["CUDA", "CPU"]),
        (["tensorrt", "cpu"], ["Tensorrt", "CPU"]),
        (["tensorrt", "cuda", "cpu"], ["Tensorrt", "CUDA", "CPU"]),
    ],
)
def test_what_tensorrt_does_not_take_goes_to_cuda(
    monkeypatch: pytest.MonkeyPatch, named: list[str], chosen: list[str]
) -> None:
    monkeypatch.setattr(onnx_providers, "require_cuda", lambda asked: None)
    options = RuntimeOptions("auto", onnx={"providers": named})
    found = onnx_providers.choose_providers(options)
    assert found == [f"{name}ExecutionProvider" for name in chosen]


@no_gpu
def test_a_first_provider_that_does_not_start_is_missed_where_the_second_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_gpu(monkeypatch)
    model = models.linear(tmp_path / "m.onnx")
    # TensorRT's libraries are missing as well, which the session would notice before.
    monkeypatch.setattr(ort.InferenceSession, "_register_ep_custom_ops", lambda *args: None)
    options = RuntimeOptions("auto", onnx={"providers": ["tensorrt"]})
    with pytest.raises(
        DeviceError, match=r"onnx\.providers: tensorrt: .* Tensorrt\w* did not start"
    ):
        OnnxBackend(model, options, models.LINEAR)


@no_gpu
def test_a_provider_that_does_not_start_is_no_silent_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The driver is said to be there, ONNX Runtime's CUDA provider then really fails to load.
    monkeypatch.setattr(onnx_providers, "missing_cuda", lambda: None)
    monkeypatch.setattr(onnx_providers, "require_cuda", lambda asked: None)
    monkeypatch.setattr(backend_module, "DriverMeter", FakeMeter)
    model = models.linear(tmp_path / "m.onnx")
    with pytest.raises(DeviceError, match=r"device: cuda: ONNX Runtime cannot use the GPU"):
        OnnxBackend(model, RuntimeOptions("cuda"), models.LINEAR)
    backend = OnnxBackend(model, RuntimeOptions("auto"), models.LINEAR)
    assert (backend.device, backend.meter) == ("cpu", None)
    assert "running on the CPU" in caplog.text


@no_gpu
@pytest.mark.parametrize("exact", [True, False])
def test_weights_beyond_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, exact: bool
) -> None:
    # It holds 600 MiB of the GPU.
    class Full(FakeMeter):
        def __init__(self, limit_bytes: int | None) -> None:
            super().__init__(limit_bytes)
            self.fixed_bytes, self.exact = 600 << 20, exact

    say_gpu(monkeypatch, Full)
    model = models.linear(tmp_path / "m.onnx")
    OnnxBackend(model, RuntimeOptions("cuda", memory_limit_bytes=600 << 20), models.LINEAR)
    assert "does not fit" not in caplog.text
    options = RuntimeOptions("cuda", memory_limit_bytes=500 << 20)
    sentence = r"does not fit into the memory of Fake GPU .* \(104857600 bytes more were asked for"
    if exact:
        with pytest.raises(DeviceError, match=sentence):
            OnnxBackend(model, options, models.LINEAR)
    else:
        # A neighbour that loads at the same moment is no reason to refuse.
        OnnxBackend(model, options, models.LINEAR)
        assert re.search(sentence, caplog.text)
