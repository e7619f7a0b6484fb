"""What the replicas of these tests run: small real ONNX graphs, and a backend under control."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.artifacts import ONNX_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import InvalidRequest
from serving.replica.backends.base import Backend, RuntimeOptions, load_model

# Values of x that make a `ScriptedBackend` misbehave; nobody sends them by chance.
RAISES = 1001.0625
LOSES_A_ROW = 1002.0625
IS_BAD_INPUT = 1003.0625
GIVES_NAN = 1004.0625
KILLS_REPLICA = 1005.0625

_OPTIONS = RuntimeOptions(device="cpu", onnx={"intra_op_threads": 1, "inter_op_threads": 1})


def signature(
    inputs: dict[str, tuple[str, tuple[int, ...]]],
    outputs: dict[str, tuple[str, tuple[int, ...]]],
    batch: Batch = Batch.DYNAMIC,
    fixed_rows: int = 0,
) -> Signature:
    def specs(of: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, *rest) for name, rest in of.items())

    return Signature(specs(inputs), specs(outputs), batch, fixed_rows)


VECTOR = signature({"x": ("FP32", (-1, 2))}, {"y": ("FP32", (-1, 2))})
LENGTHS = signature({"x": ("FP32", (-1, -1))}, {"y": ("FP32", (-1, -1))})


class ScriptedBackend:
    """y = factor · x, when `gate` is open. Remembers what reached it.

    Some values of x make it fail, and while it has a `failure` every value does.
    """

    platform = "test"
    device = "cpu"
    precision = "FP32"

    def __init__(
        self, of: Signature = VECTOR, *, mortal: bool = False, factor: float = 2.0
    ) -> None:
        self.signature = of
        self.factor = factor
        self.failure: Exception | None = None
        self.mortal = mortal
        self.gate = threading.Event()
        self.gate.set()
        self.runs: list[list[float]] = []
        self.running = 0

    @property
    def seen(self) -> list[float]:
        """The first value of every row that reached the model."""
        return [value for run in self.runs for value in run]

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        (x,) = inputs
        self.runs.append([float(row.flat[0]) for row in x])
        self.running += 1
        try:
            assert self.gate.wait(60), "the gate stayed shut"
        finally:
            self.running -= 1
        if self.failure is not None:
            raise self.failure
        if self.mortal and (x == KILLS_REPLICA).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if (x == RAISES).any():
            raise RuntimeError("a marked value")
        if (x == IS_BAD_INPUT).any():
            raise InvalidRequest("a marked value is no input of this model")
        with np.errstate(over="ignore"):
            y = (x * self.factor).astype(x.dtype)
        y[x == GIVES_NAN] = np.nan
        return [y[1:] if (x == LOSES_A_ROW).any() else y]

    def close(self) -> None:
        pass


MLP = signature({"x": ("FP32", (-1, 64))}, {"p": ("FP32", (-1, 10))})
STRINGS = signature({"x": ("BYTES", (-1, 2))}, {"y": ("BYTES", (-1, 2))})
SIMPLE = signature(
    {"INPUT0": ("INT32", (-1, 16)), "INPUT1": ("INT32", (-1, 16))},
    {"OUTPUT0": ("INT32", (-1, 16)), "OUTPUT1": ("INT32", (-1, 16))},
)
WIDE = signature({"x": ("FP32", (-1, -1))}, {"y": ("FP32", (-1, -1))})
WHOLE = signature({"x": ("INT64", (3,))}, {"y": ("INT64", (3,))}, Batch.NONE)
FROZEN = signature({"x": ("FP32", (-1, 2))}, {"y": ("FP32", (-1, 2))}, Batch.FIXED, 4)


def mlp_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w1": (64, 128), "b1": (128,), "w2": (128, 10), "b2": (10,)}
    return {n: (rng.standard_normal(s) * 0.1).astype(np.float32) for n, s in shapes.items()}


def mlp_answer(x: np.ndarray) -> np.ndarray:
    """What the MLP gives, computed by numpy."""
    w = mlp_weights()
    scores = np.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"] + w["b2"]
    exp = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def build(name: str, directory: Path) -> Backend:
    """A real ONNX Runtime session: mlp, strings, simple, wide, whole or frozen."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper, numpy_helper

    node, value = helper.make_node, helper.make_tensor_value_info
    nodes, inputs, outputs, of = {
        "mlp": (
            [
                node("Gemm", ["x", "w1", "b1"], ["h"]),
                node("Relu", ["h"], ["r"]),
                node("Gemm", ["r", "w2", "b2"], ["s"]),
                node("Softmax", ["s"], ["p"], axis=1),
            ],
            [value("x", T.FLOAT, ["n", 64])],
            [value("p", T.FLOAT, ["n", 10])],
            MLP,
        ),
        "strings": (
            [node("Identity", ["x"], ["y"])],
            [value("x", T.STRING, ["n", 2])],
            [value("y", T.STRING, ["n", 2])],
            STRINGS,
        ),
        "simple": (
            [
                node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
                node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
            ],
            [value(f"INPUT{i}", T.INT32, ["n", 16]) for i in (0, 1)],
            [value(f"OUTPUT{i}", T.INT32, ["n", 16]) for i in (0, 1)],
            SIMPLE,
        ),
        "wide": (
            [node("Neg", ["x"], ["y"])],
            [value("x", T.FLOAT, ["n", "length"])],
            [value("y", T.FLOAT, ["n", "length"])],
            WIDE,
        ),
        "whole": (
            [node("Neg", ["x"], ["y"])],
            [value("x", T.INT64, [3])],
            [value("y", T.INT64, [3])],
            WHOLE,
        ),
        "frozen": (
            [node("Neg", ["x"], ["y"])],
            [value("x", T.FLOAT, [4, 2])],
            [value("y", T.FLOAT, [4, 2])],
            FROZEN,
        ),
    }[name]
    weights = mlp_weights() if name == "mlp" else {}
    initializers = [numpy_helper.from_array(array, n) for n, array in weights.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = directory / f"{name}.onnx"
    onnx.save(model, path)
    return load_model(path, ONNX_PLATFORM, _OPTIONS, of)
