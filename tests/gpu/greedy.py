"""Models whose scratch memory is known: y = 2x, with `row_bytes` of scratch for each row."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from serving.artifacts import ONNX_PLATFORM, TORCHSCRIPT_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.base import Backend, RuntimeOptions, load_model

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),), Batch.DYNAMIC
)


class Greedy(torch.nn.Module):
    def __init__(self, row_bytes: int) -> None:
        super().__init__()
        self.row_bytes = row_bytes
        # Something that lies on a device.
        self.two = torch.nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = [x.size(0), self.row_bytes]
        scratch = torch.zeros(shape, dtype=torch.uint8, device=x.device)
        return x * self.two + scratch[:, :1].to(torch.float32)


def load(runtime: str, directory: Path, row_bytes: int, limit_bytes: int | None = None) -> Backend:
    """The model on the GPU, by `torch` or `onnx`."""
    if runtime == "torch":
        path, platform = directory / "m.ts", TORCHSCRIPT_PLATFORM
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(Greedy(row_bytes).eval()).save(str(path))
    else:
        path, platform = _write_onnx(directory / "m.onnx", row_bytes // 4), ONNX_PLATFORM
    options = RuntimeOptions("cuda", memory_limit_bytes=limit_bytes)
    return load_model(path, platform, options, SIGNATURE)


def _write_onnx(path: Path, row_numbers: int) -> Path:
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "width"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["scratch"]),
        helper.make_node("ReduceMax", ["scratch"], ["zero"], axes=[1], keepdims=1),
        helper.make_node("Add", ["x", "x"], ["double"]),
        helper.make_node("Add", ["double", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "greedy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.array([row_numbers], np.int64), "width")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path
