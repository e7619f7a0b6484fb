"""Small ONNX graphs, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET: Final = 17
IR_VERSION: Final = 9
_SEED: Final = 7

ECHO_DATATYPES: Final = {
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


def write_mlp(directory: Path) -> Path:
    """`x` FP32 [-1, 64] to `p` FP32 [-1, 10] through 128 hidden units and a softmax."""
    rng = np.random.default_rng(_SEED)
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.1).astype(np.float32), name)
        for name, shape in (("w1", (64, 128)), ("b1", (128,)), ("w2", (128, 10)), ("b2", (10,)))
    ]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=1),
    ]
    inputs = [_value("x", TensorProto.FLOAT, ["rows", 64])]
    outputs = [_value("p", TensorProto.FLOAT, ["rows", 10])]
    return _write(directory, "mlp", nodes, inputs, outputs, weights)


def write_simple(directory: Path) -> Path:
    """The well-known example: INPUT0, INPUT1 INT32 [-1, 16] to their sum and difference."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
    ]
    return _write_pair(directory, "simple", nodes, TensorProto.INT32)


def write_simple_string(directory: Path) -> Path:
    """`simple` on BYTES: decimal strings in, decimal strings out."""
    nodes = [
        helper.make_node("Cast", ["INPUT0"], ["a"], to=TensorProto.INT32),
        helper.make_node("Cast", ["INPUT1"], ["b"], to=TensorProto.INT32),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
        helper.make_node("Cast", ["sum"], ["OUTPUT0"], to=TensorProto.STRING),
        helper.make_node("Cast", ["difference"], ["OUTPUT1"], to=TensorProto.STRING),
    ]
    return _write_pair(directory, "simple_string", nodes, TensorProto.STRING)


def write_simple_identity(directory: Path) -> Path:
    """INPUT0 BYTES [-1, -1] to OUTPUT0, unchanged."""
    return _write_identity(directory, "simple_identity", TensorProto.STRING, "INPUT0", "OUTPUT0")


def write_echo(datatype: str, directory: Path) -> Path:
    """`x` of `datatype` [-1, -1] to `y`, unchanged."""
    return _write_identity(
        directory, f"echo_{datatype.lower()}", ECHO_DATATYPES[datatype], "x", "y"
    )


def _write_identity(directory: Path, name: str, kind: int, source: str, target: str) -> Path:
    inputs = [_value(source, kind, ["rows", "width"])]
    outputs = [_value(target, kind, ["rows", "width"])]
    node = helper.make_node("Identity", [source], [target])
    return _write(directory, name, [node], inputs, outputs)


def _write_pair(directory: Path, name: str, nodes: Sequence[Any], kind: int) -> Path:
    inputs = [_value(n, kind, ["rows", 16]) for n in ("INPUT0", "INPUT1")]
    outputs = [_value(n, kind, ["rows", 16]) for n in ("OUTPUT0", "OUTPUT1")]
    return _write(directory, name, nodes, inputs, outputs)


def _value(name: str, kind: int, shape: Sequence[int | str]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _write(
    directory: Path,
    name: str,
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    weights: Sequence[Any] = (),
) -> Path:
    graph = helper.make_graph(nodes, name, inputs, outputs, weights)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    path = directory / "model.onnx"
    onnx.save(model, path)
    return path
