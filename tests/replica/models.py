"""Tiny real models, made where a test needs one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.base import Backend, RuntimeOptions, load_model

Value = tuple[str, int, Sequence[int | str]]


def save_onnx(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: dict[str, np.ndarray] | None = None,
    *,
    external: str | None = None,
) -> Path:
    """An ONNX file; with `external`, its weights lie in a file of that name beside it."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(*v) for v in inputs],
        [helper.make_tensor_value_info(*v) for v in outputs],
        [numpy_helper.from_array(a, name) for name, a in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if external is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    return path


def linear(path: Path, rows: int | str = "batch", **options: Any) -> Path:
    """p = x @ W, x FP32 [rows, 4], p FP32 [rows, 3], W[i, j] = 3 i + j."""
    return save_onnx(
        path,
        [helper.make_node("MatMul", ["x", "W"], ["p"])],
        [("x", TensorProto.FLOAT, [rows, 4])],
        [("p", TensorProto.FLOAT, [rows, 3])],
        {"W": LINEAR_W},
        **options,
    )


LINEAR_W = np.arange(12, dtype=np.float32).reshape(4, 3)
LINEAR = Signature(
    (TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("p", "FP32", (-1, 3)),), Batch.DYNAMIC
)


def identity(path: Path, element_type: int, shape: Sequence[int | str] = ("batch", 2)) -> Path:
    """y = x of any element type."""
    return save_onnx(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", element_type, shape)],
        [("y", element_type, shape)],
    )


def identity_signature(datatype: str, shape: tuple[int, ...] = (-1, 2)) -> Signature:
    return Signature(
        (TensorSpec("x", datatype, shape),), (TensorSpec("y", datatype, shape),), Batch.DYNAMIC
    )


def gather(path: Path) -> Path:
    """y = table[i], i INT64 [batch], table of 5 rows of 2: an index of 5 or more fails the run."""
    return save_onnx(
        path,
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", TensorProto.INT64, ["batch"])],
        [("y", TensorProto.FLOAT, ["batch", 2])],
        {"table": GATHER_TABLE},
    )


GATHER_TABLE = np.arange(10, dtype=np.float32).reshape(5, 2)
GATHER = Signature(
    (TensorSpec("i", "INT64", (-1,)),), (TensorSpec("y", "FP32", (-1, 2)),), Batch.DYNAMIC
)


def halves_rows(path: Path) -> Path:
    """y = the first of each pair of rows of x: the wrong number of rows for whoever batches it."""
    return save_onnx(
        path,
        [helper.make_node("Slice", ["x", "start", "end", "axis", "step"], ["y"])],
        [("x", TensorProto.FLOAT, ["batch", 2])],
        [("y", TensorProto.FLOAT, ["half", 2])],
        {
            "start": np.array([0], np.int64),
            "end": np.array([2**31], np.int64),
            "axis": np.array([0], np.int64),
            "step": np.array([2], np.int64),
        },
    )


def rows_depend(path: Path) -> Path:
    """y = softmax over the rows of x: variable rows, but no batch."""
    return save_onnx(
        path,
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        [("x", TensorProto.FLOAT, ["n", 2])],
        [("y", TensorProto.FLOAT, ["n", 2])],
    )


class Net(torch.nn.Module):
    """A small network with a mapping of outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = torch.nn.Linear(4, 8)
        self.out = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.out(torch.relu(self.hidden(x))) * scale
        return {"logits": logits, "best": logits.argmax(1)}


NET = Signature(
    (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("scale", "FP32", (-1, 1))),
    (TensorSpec("logits", "FP32", (-1, 3)), TensorSpec("best", "INT64", (-1,))),
    Batch.DYNAMIC,
)


def export_net(path: Path, *, dynamic: bool = True, rows: int = 2) -> Path:
    """`Net` as a .pt2, its second argument by keyword."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = {"x": {0: batch}, "scale": {0: batch}} if dynamic else None
    program = torch.export.export(
        Net().eval(),
        (torch.randn(rows, 4),),
        {"scale": torch.ones(rows, 1)},
        dynamic_shapes=shapes,
    )
    torch.export.save(program, path)
    return path


def export_module(path: Path, module: torch.nn.Module, *inputs: torch.Tensor) -> Path:
    """Any module as a .pt2 with a variable first dimension."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(
        module.eval(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs)
    )
    torch.export.save(program, path)
    return path


def script(path: Path, module: torch.nn.Module) -> Path:
    torch.jit.script(module.eval()).save(str(path))
    return path


def cpu_backend(model: Path, platform: str, signature: Signature | None, **options: Any) -> Backend:
    return load_model(model, platform, RuntimeOptions("cpu", **options), signature)
