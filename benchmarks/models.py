"""The models that are measured, bare sessions of them, and their requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

MLP_FEATURES = 64
IMAGE_SHAPE = (3, 224, 224)

Rows = NDArray[np.float32]


def cpu_session(model: Path) -> Any:
    """An ONNX Runtime session on the CPU with one thread, as every system here runs the model."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def write_image_mean(directory: Path) -> Path:
    """Write a model that reads images and does next to nothing with them; returns its file.

    `image` FP32 [-1, 3, 224, 224] to `mean` FP32 [-1, 3]: the input of ResNet-50, so that what is
    left of a request's latency is its transport.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)],
        "image_mean",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", *IMAGE_SHAPE])],
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["rows", IMAGE_SHAPE[0]])],
    )
    opset = helper.make_opsetid("", 17)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def mlp_rows(rows: int = 1) -> Rows:
    """Input rows of the MLP: sixteenths, the values of a digit scan scaled to 0..1."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 17, (rows, MLP_FEATURES)).astype(np.float32) / np.float32(16)


def images(rows: int) -> Rows:
    """Noise of the shape of `rows` normalised images."""
    return np.random.default_rng(2).standard_normal((rows, *IMAGE_SHAPE), dtype=np.float32)


def json_body(name: str, rows: Rows) -> bytes:
    """An infer request with one FP32 tensor as JSON, flat."""
    tensor = {"name": name, "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel()}
    return orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)


def binary_body(name: str, rows: Rows) -> tuple[bytes, int]:
    """An infer request with one FP32 tensor as raw bytes, to be answered in raw bytes.

    Returns the body and the length of its JSON part (`Inference-Header-Content-Length`).
    """
    raw = rows.tobytes()
    tensor = {
        "name": name,
        "shape": list(rows.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(raw)},
    }
    head = orjson.dumps({"parameters": {"binary_data_output": True}, "inputs": [tensor]})
    return head + raw, len(head)


def read_output(body: bytes, json_bytes: int | None) -> Rows:
    """The first output of an answer, FP32; `json_bytes` is None for a JSON answer."""
    if json_bytes is None:
        output = orjson.loads(body)["outputs"][0]
        return np.asarray(output["data"], dtype=np.float32).reshape(output["shape"])
    output = orjson.loads(body[:json_bytes])["outputs"][0]
    return np.frombuffer(body, np.float32, offset=json_bytes).reshape(output["shape"])
