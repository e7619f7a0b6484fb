"""The Torch backend: exported programs and TorchScript, alone and over the wire."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.artifacts import EXPORT_PLATFORM, TORCHSCRIPT_PLATFORM
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec
from serving.errors import ArtifactError, DeviceError
from serving.replica.backends import cuda, torch_cuda
from serving.replica.backends.base import RuntimeOptions
from serving.replica.backends.faults import MemoryExhausted
from serving.replica.backends.torch import TorchBackend

from . import models
from .client import Client, Failed
from .conftest import Serve
from .fakes import FakeMeter
from .test_onnx import values

no_gpu = pytest.mark.skipif(cuda.missing_cuda() is None, reason="there is a GPU here")


def inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.normal(size=(n, 4)).astype(np.float32), rng.normal(size=(n, 1)).astype(np.float32)


def expected(x: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        outputs = models.Net().eval()(torch.from_numpy(x), torch.from_numpy(scale))
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return models.export_net(tmp_path / "net.pt2")


def test_an_exported_program_answers_over_the_wire(serve: Serve, net: Path) -> None:
    backend = models.cpu_backend(net, EXPORT_PLATFORM, models.NET)
    with Client.unix(serve(backend, buckets=(4, 64)).unix_path) as client:
        for n in (1, 3, 20):
            x, scale = inputs(n)
            logits, best = client.infer(x, scale)
            want = expected(x, scale)
            np.testing.assert_allclose(logits, want["logits"], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(best, want["best"])


def test_an_exported_program_declares_its_signature(net: Path) -> None:
    declared = models.cpu_backend(net, EXPORT_PLATFORM, None).signature
    assert (declared.inputs, declared.outputs) == (models.NET.inputs, models.NET.outputs)


def test_a_batch_outside_the_exported_range_fails_with_the_reason(serve: Serve, net: Path) -> None:
    backend = models.cpu_backend(net, EXPORT_PLATFORM, models.NET)
    with Client.unix(serve(backend, max_size=5000).unix_path) as client:
        with pytest.raises(Failed, match=r"model_failed: .*1024"):
            client.infer(*inputs(2000))
        assert len(client.infer(*inputs(2))) == 2


class Longest(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(1, keepdim=True)


def test_a_request_outside_the_exported_range_is_refused_with_the_range(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "longest.pt2"
    sizes = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("length", min=2, max=16)}
    torch.export.save(
        torch.export.export(Longest(), (torch.ones(2, 3),), dynamic_shapes=(sizes,)), path
    )
    backend = models.cpu_backend(path, EXPORT_PLATFORM, None)
    backend.signature = replace(backend.signature, batch=Batch.DYNAMIC)
    with Client.unix(serve(backend).unix_path) as client:
        with pytest.raises(Failed, match=r"invalid_request: .*size\(\)\[1\] <= 16"):
            client.infer(np.ones((1, 17), np.float32))
        (longest,) = client.infer(np.ones((1, 16), np.float32))
        assert longest.tolist() == [[1.0]]


class Scripted(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x.sum(1)


SCRIPTED = Signature(
    (TensorSpec("x", "FP32", (-1, 4)),),
    (TensorSpec("output0", "FP32", (-1, 4)), TensorSpec("output1", "FP32", (-1,))),
    Batch.DYNAMIC,
)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
class TestTorchScript:
    def test_answers_over_the_wire(self, serve: Serve, tmp_path: Path) -> None:
        model = models.script(tmp_path / "m.ts", Scripted())
        backend = models.cpu_backend(model, TORCHSCRIPT_PLATFORM, SCRIPTED)
        x, _ = inputs(5)
        with Client.unix(serve(backend).unix_path) as client:
            doubled, total = client.infer(x)
        np.testing.assert_allclose(doubled, x * 2)
        np.testing.assert_allclose(total, x.sum(1), rtol=1e-5, atol=1e-6)

    def test_needs_a_signature(self, tmp_path: Path) -> None:
        model = models.script(tmp_path / "m.ts", Scripted())
        with pytest.raises(ArtifactError, match="TorchScript does not record its inputs"):
            models.cpu_backend(model, TORCHSCRIPT_PLATFORM, None)

    def test_does_not_compile(self, tmp_path: Path) -> None:
        model = models.script(tmp_path / "m.ts", Scripted())
        with pytest.raises(ArtifactError, match=r"torch\.compile does not take TorchScript"):
            models.cpu_backend(model, TORCHSCRIPT_PLATFORM, SCRIPTED, torch={"compile": True})

    def test_an_output_too_many_is_the_models_fault(self, serve: Serve, tmp_path: Path) -> None:
        model = models.script(tmp_path / "m.ts", Scripted())
        signature = Signature(SCRIPTED.inputs, SCRIPTED.outputs[:1], Batch.DYNAMIC)
        backend = models.cpu_backend(model, TORCHSCRIPT_PLATFORM, signature)
        with (
            Client.unix(serve(backend).unix_path) as client,
            pytest.raises(Failed, match="returned 2 outputs, its signature has 1"),
        ):
            client.infer(inputs(1)[0])

    def test_a_wrong_datatype_is_the_models_fault(self, serve: Serve, tmp_path: Path) -> None:
        model = models.script(tmp_path / "m.ts", Scripted())
        wrong = (SCRIPTED.outputs[0], TensorSpec("output1", "INT64", (-1,)))
        backend = models.cpu_backend(
            model, TORCHSCRIPT_PLATFORM, Signature(SCRIPTED.inputs, wrong, Batch.DYNAMIC)
        )
        with (
            Client.unix(serve(backend).unix_path) as client,
            pytest.raises(Failed, match=r"'output1' came back as float32, .* says INT64"),
        ):
            client.infer(inputs(1)[0])


class Engineless(torch.nn.Module):
    """As a convolution of which no variant found its workspace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("FIND was unable to find an engine to execute this computation")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_convolution_that_torch_refused_memory_is_short_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = models.identity_signature("FP32")
    model = models.script(tmp_path / "m.ts", Engineless())
    backend = models.cpu_backend(model, TORCHSCRIPT_PLATFORM, signature)
    backend.meter = FakeMeter(None)
    x = [np.zeros((1, 2), np.float32)]
    # How often the allocator has refused memory by now: torch counts it, the error does not say it.
    for refused, error in ((1, MemoryExhausted), (1, torch.jit.Error), (3, MemoryExhausted)):
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda n=refused: {"num_ooms": n})
        with pytest.raises(error, match="memory" if error is MemoryExhausted else "an engine"):
            backend.run(x)


class Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


@pytest.mark.parametrize("datatype", [d for d in DATATYPES if d != "BYTES"])
def test_every_datatype_survives(serve: Serve, tmp_path: Path, datatype: str) -> None:
    x = values(datatype)
    tensor = torch.from_numpy(x).view(torch.bfloat16) if datatype == "BF16" else torch.from_numpy(x)
    model = models.export_module(tmp_path / "m.pt2", Same(), tensor)
    declared = models.cpu_backend(model, EXPORT_PLATFORM, None).signature
    assert declared.inputs[0].datatype == datatype
    backend = models.cpu_backend(model, EXPORT_PLATFORM, models.identity_signature(datatype))
    with Client.unix(serve(backend).unix_path) as client:
        (y,) = client.infer(x, datatypes=(datatype,))
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x)


def test_bytes_are_refused(tmp_path: Path) -> None:
    model = models.export_module(tmp_path / "m.pt2", Same(), torch.ones(2, 2))
    with pytest.raises(ArtifactError, match="'x' is BYTES, which torch has not"):
        models.cpu_backend(model, EXPORT_PLATFORM, models.identity_signature("BYTES"))


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "BF16"), ("float16", "FP16")])
def test_a_dtype_setting_changes_the_arithmetic_but_not_the_interface(
    net: Path, dtype: str, precision: str
) -> None:
    backend = models.cpu_backend(net, EXPORT_PLATFORM, models.NET, torch={"dtype": dtype})
    assert backend.precision == precision
    x, scale = inputs(6)
    logits, best = backend.run([x, scale])
    want = expected(x, scale)["logits"]
    assert (logits.dtype, best.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(logits, want, rtol=5e-2, atol=5e-2)
    assert not np.array_equal(logits, want)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_gives_the_same(serve: Serve, net: Path) -> None:
    backend = models.cpu_backend(net, EXPORT_PLATFORM, models.NET, torch={"compile": True})
    with Client.unix(serve(backend).unix_path) as client:
        for n in (2, 5):
            x, scale = inputs(n)
            logits, _ = client.infer(x, scale)
            np.testing.assert_allclose(logits, expected(x, scale)["logits"], rtol=1e-4, atol=1e-6)


def test_the_thread_setting_is_taken(net: Path) -> None:
    before = torch.get_num_threads()
    try:
        models.cpu_backend(net, EXPORT_PLATFORM, models.NET, torch={"threads": 2})
        assert torch.get_num_threads() == 2
        models.cpu_backend(net, EXPORT_PLATFORM, models.NET, torch={"threads": 0})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("platform", [EXPORT_PLATFORM, TORCHSCRIPT_PLATFORM])
def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path, platform: str) -> None:
    model = tmp_path / "m.pt2"
    model.write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match="torch cannot load it") as error:
        models.cpu_backend(model, platform, models.NET)
    assert "\n" not in str(error.value)


def test_a_signature_that_is_not_the_graphs_is_refused(net: Path) -> None:
    other = Signature(models.NET.inputs[:1], models.NET.outputs, Batch.DYNAMIC)
    with pytest.raises(ArtifactError, match=r"its inputs are .* its signature.json says"):
        models.cpu_backend(net, EXPORT_PLATFORM, other)


@no_gpu
def test_asking_for_a_gpu_that_is_not_there_is_refused(
    net: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DeviceError, match="run this replica on a node with a GPU"):
        TorchBackend(net, EXPORT_PLATFORM, RuntimeOptions("cuda"), models.NET)
    assert TorchBackend(net, EXPORT_PLATFORM, RuntimeOptions("auto"), models.NET).device == "cpu"
    # A driver is there, but torch cannot use it.
    monkeypatch.setattr(torch_cuda, "missing_cuda", lambda: None)
    monkeypatch.setattr(torch_cuda, "require_cuda", lambda asked: None)
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(DeviceError, match="device: cuda: torch cannot use the GPU"):
        TorchBackend(net, EXPORT_PLATFORM, RuntimeOptions("cuda"), models.NET)
    assert not caplog.messages
    assert TorchBackend(net, EXPORT_PLATFORM, RuntimeOptions("auto"), models.NET).device == "cpu"
    said = "a GPU is there, but not for torch: this build of torch has no CUDA: running on the CPU"
    assert caplog.messages == [said]


def test_weights_that_are_elsewhere_are_found_out(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(net, EXPORT_PLATFORM, RuntimeOptions("cpu"), models.NET)
    backend.check()
    monkeypatch.setattr(backend, "device", "cuda:0")
    with pytest.raises(DeviceError, match=r"the weights '.*' are on cpu, not cuda:0"):
        backend.check()
