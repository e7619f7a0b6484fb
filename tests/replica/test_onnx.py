"""The ONNX Runtime backend, alone and over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from serving.artifacts import ONNX_PLATFORM
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec
from serving.errors import ArtifactError, DeviceError, InvalidRequest
from serving.replica.backends import cuda
from serving.replica.backends import onnx as backend_module
from serving.replica.backends.base import RuntimeOptions
from serving.replica.backends.faults import FatalDeviceError
from serving.replica.backends.onnx import OnnxBackend
from serving.replica.probing import to_bfloat16

from . import models
from .client import Client, Failed
from .conftest import Serve

no_gpu = pytest.mark.skipif(cuda.missing_cuda() is None, reason="there is a GPU here")
ELEMENT_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


def values(datatype: str) -> np.ndarray:
    """Three rows of two values at the datatype's limits."""
    if datatype == "BYTES":
        texts = [b"", b"a\0b", "größe 🙂".encode(), b"12", b" ", b"x" * 5000]
        return objects(texts).reshape(3, 2)
    dtype = DATATYPES[datatype].numpy
    if datatype == "BF16":
        floats = np.array([[0, -1.5], [np.inf, np.nan], [1e30, 3.0]], np.float32)
        return to_bfloat16(floats)
    if datatype == "BOOL":
        return np.array([[True, False], [False, True], [True, True]])
    if dtype.kind == "f":
        info = np.finfo(dtype)
        return np.array([[0, -1.5], [info.max, info.min], [np.inf, info.tiny]], dtype)
    info = np.iinfo(dtype)
    return np.array([[0, 1], [info.max, info.min], [7, 8]], dtype)


def objects(elements: list[bytes]) -> np.ndarray:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def test_every_datatype_has_an_element_type() -> None:
    assert set(ELEMENT_TYPES) == set(DATATYPES)


@pytest.mark.parametrize("datatype", ELEMENT_TYPES)
def test_every_datatype_survives_the_way_there_and_back(
    serve: Serve, tmp_path: Path, datatype: str
) -> None:
    model = models.identity(tmp_path / "m.onnx", ELEMENT_TYPES[datatype])
    backend = models.cpu_backend(model, ONNX_PLATFORM, models.identity_signature(datatype))
    x = values(datatype)
    with Client.unix(serve(backend, buckets=(4,)).unix_path) as client:
        (y,) = client.infer(x, datatypes=(datatype,))
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x)


def test_bfloat16_is_computed_with(tmp_path: Path) -> None:
    model = models.save_onnx(
        tmp_path / "m.onnx",
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["f", "f"], ["d"]),
            helper.make_node("Cast", ["d"], ["y"], to=TensorProto.BFLOAT16),
        ],
        [("x", TensorProto.BFLOAT16, ["batch", 2])],
        [("y", TensorProto.BFLOAT16, ["batch", 2])],
    )
    backend = models.cpu_backend(model, ONNX_PLATFORM, models.identity_signature("BF16"))
    x = np.array([[1.0, -2.5]], np.float32)
    np.testing.assert_array_equal(backend.run([to_bfloat16(x)])[0], to_bfloat16(2 * x))


def test_bytes_that_are_not_text_are_refused_and_batch_mates_are_not(
    serve: Serve, tmp_path: Path
) -> None:
    # ONNX Runtime's strings are UTF-8: handed `bytes`, its Python interface would silently store
    # their repr, b'…'.
    model = models.identity(tmp_path / "m.onnx", TensorProto.STRING, ("batch", 1))
    backend = models.cpu_backend(model, ONNX_PLATFORM, models.identity_signature("BYTES", (-1, 1)))
    with pytest.raises(InvalidRequest, match="input 'x': element 1 is not valid UTF-8"):
        backend.run([objects([b"ok", b"\xff\xfe"]).reshape(2, 1)])
    with Client.unix(serve(backend).unix_path) as client:
        with pytest.raises(Failed, match="element 0 is not valid UTF-8") as failed:
            client.infer(objects([b"\xff"]).reshape(1, 1))
        assert failed.value.slug == "invalid_request"
        (y,) = client.infer(objects(["é".encode()]).reshape(1, 1))
        assert y.tolist() == [["é".encode()]]


def test_a_bytes_tensor_whose_lengths_do_not_add_up_is_refused(
    serve: Serve, tmp_path: Path
) -> None:
    model = models.identity(tmp_path / "m.onnx", TensorProto.STRING, ("batch", 1))
    backend = models.cpu_backend(model, ONNX_PLATFORM, models.identity_signature("BYTES", (-1, 1)))
    # UINT8 stands in for a raw form that was cut short or has an element too many.
    with Client.unix(serve(backend).unix_path) as client:
        for raw in (b"\x05\0\0\0ab", b"\0\0\0\0\0\0\0\0", b"\0\0"):
            bad = np.frombuffer(raw, np.uint8).reshape(1, -1)
            client.batch_id += 1
            client.sock.sendall(_bytes_frame(client.batch_id, bad))
            with pytest.raises(Failed, match="invalid_request: a BYTES tensor of shape"):
                client.read_result()


def _bytes_frame(batch_id: int, raw: np.ndarray) -> bytes:
    from serving.core import frames

    entry = frames.TensorEntry(0, "BYTES", (1, 1), raw.size)
    meta = frames.INFER_HEAD.pack(batch_id, 1, 0, 0) + frames.encode_table([entry])
    payload = raw.tobytes() + frames.padding(raw.size)
    return frames.encode_prefix(frames.Kind.INFER, 1, len(meta), len(payload)) + meta + payload


def test_earlier_results_stay_whole(tmp_path: Path) -> None:
    model = models.linear(tmp_path / "m.onnx")
    backend = OnnxBackend(model, RuntimeOptions("cpu"), models.LINEAR)
    kept = []
    for n in (*range(1, 40), 1, 2):
        x = np.full((n, 4), n, np.float32)
        kept.append((x, backend.run([x])[0]))
    for x, y in kept:
        np.testing.assert_allclose(y, x @ models.LINEAR_W, rtol=1e-5)


@no_gpu
@pytest.mark.parametrize(
    "options",
    [
        RuntimeOptions("cuda"),
        RuntimeOptions("auto", onnx={"providers": ["cuda", "cpu"]}),
        RuntimeOptions("auto", onnx={"providers": ["tensorrt"]}),
    ],
)
def test_asking_for_a_gpu_that_is_not_there_is_refused(
    tmp_path: Path, options: RuntimeOptions
) -> None:
    with pytest.raises(DeviceError, match="run this replica on a node with a GPU") as error:
        OnnxBackend(models.linear(tmp_path / "m.onnx"), options, models.LINEAR)
    assert "\n" not in str(error.value)


@no_gpu
def test_auto_runs_on_the_cpu_without_a_gpu(tmp_path: Path) -> None:
    backend = OnnxBackend(models.linear(tmp_path / "m.onnx"), RuntimeOptions("auto"), models.LINEAR)
    assert (backend.device, backend.precision) == ("cpu", "FP32")


def test_a_provider_that_fails_in_a_run_is_no_silent_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # By default a session whose provider fails makes itself anew on the CPU and runs there.
    backend = OnnxBackend(models.linear(tmp_path / "m.onnx"), RuntimeOptions("cpu"), models.LINEAR)
    failure = ort.capi.onnxruntime_pybind11_state.EPFail("CUDA failure 1: invalid argument")

    class Broken:
        def __init__(self, session: Any) -> None:
            self.session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run(self, *_: object) -> list[np.ndarray]:
            raise failure

    monkeypatch.setattr(backend._session, "_sess", Broken(backend._session._sess))
    with pytest.raises(type(failure), match="CUDA failure 1"):
        backend.run([np.ones((1, 4), np.float32)])
    assert "Falling back" not in capfd.readouterr().out


def test_a_session_that_left_its_device_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OnnxBackend(models.linear(tmp_path / "m.onnx"), RuntimeOptions("cpu"), models.LINEAR)
    backend.check()
    monkeypatch.setattr(backend, "_provider", "CUDAExecutionProvider")
    sentence = "the model runs on CPUExecutionProvider, it was loaded on CUDAExecutionProvider"
    with pytest.raises(DeviceError, match=sentence):
        backend.check()


def test_a_context_that_broke_is_found_by_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OnnxBackend(models.linear(tmp_path / "m.onnx"), RuntimeOptions("cpu"), models.LINEAR)
    monkeypatch.setattr(backend, "device", "cuda:0")
    monkeypatch.setattr(backend_module, "context_fault", lambda: "an illegal address")
    with pytest.raises(FatalDeviceError, match="in this process: an illegal address"):
        backend.check()


@pytest.mark.parametrize(
    ("device", "providers", "message"),
    [
        ("cpu", ["cuda"], "onnx.providers asks for cuda but device is cpu"),
        ("cuda", ["cpu"], "device is cuda but onnx.providers names only cpu"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, device: str, providers: list[str], message: str
) -> None:
    options = RuntimeOptions(device, onnx={"providers": providers})
    with pytest.raises(DeviceError, match=message):
        OnnxBackend(models.linear(tmp_path / "m.onnx"), options, models.LINEAR)


@pytest.mark.parametrize(
    "settings",
    [
        {"intra_op_threads": 2, "graph_optimization": "disabled"},
        {"inter_op_threads": 2, "graph_optimization": "basic"},
        {"intra_op_threads": 0, "graph_optimization": "extended", "providers": ["cpu"]},
    ],
)
def test_session_settings_are_taken(tmp_path: Path, settings: dict[str, Any]) -> None:
    backend = models.cpu_backend(
        models.linear(tmp_path / "m.onnx"), ONNX_PLATFORM, models.LINEAR, onnx=settings
    )
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(backend.run([x])[0], x @ models.LINEAR_W)


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load it") as error:
        models.cpu_backend(model, ONNX_PLATFORM, models.LINEAR)
    assert "\n" not in str(error.value)


def test_a_signature_that_is_not_the_graphs_is_refused(tmp_path: Path) -> None:
    model = models.linear(tmp_path / "m.onnx")
    other = Signature((TensorSpec("x", "FP64", (-1, 4)),), models.LINEAR.outputs, Batch.DYNAMIC)
    with pytest.raises(ArtifactError, match=r"its inputs are .*FP32.*, its signature.json says"):
        models.cpu_backend(model, ONNX_PLATFORM, other)


def test_a_graph_with_a_type_outside_the_protocol_is_refused(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["s"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [sequence],
    )
    model = tmp_path / "m.onnx"
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model.write_bytes(built.SerializeToString())
    with pytest.raises(ArtifactError, match=r"'s' is a seq\(tensor\(float\)\)"):
        models.cpu_backend(model, ONNX_PLATFORM, None)
