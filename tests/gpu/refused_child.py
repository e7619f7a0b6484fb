"""Loads a model with 1 GiB of weights that may hold 1 GiB, CUDA's context included.

`python -m tests.gpu.refused_child torch|onnx` prints what the product says to that.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from serving.artifacts import ONNX_PLATFORM, TORCHSCRIPT_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import DeviceError
from serving.replica.backends import cuda
from serving.replica.backends.base import RuntimeOptions, load_model
from tests.gpu import reading

ROWS, WIDTH = 1 << 14, 1 << 14
WEIGHTS_BYTES = 4 * ROWS * WIDTH
SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, ROWS)),), (TensorSpec("y", "FP32", (-1, WIDTH)),), Batch.DYNAMIC
)


def main(runtime: str) -> None:
    gpu = reading.Device()
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("serving").addHandler(handler)
    refusal = None
    with tempfile.TemporaryDirectory() as directory:
        path, platform = write(runtime, Path(directory))
        options = RuntimeOptions("cuda", memory_limit_bytes=WEIGHTS_BYTES)
        try:
            # Kept until the memory is read.
            backend = load_model(path, platform, options, SIGNATURE)  # noqa: F841
        except DeviceError as error:
            refusal = str(error)
        cuda.open_context()
        print(
            json.dumps(
                {
                    "refusal": refusal,
                    "logged": heard,
                    "nvml_knows_it": gpu.knows_this_process(),
                    "nvml_bytes": gpu.grown_bytes(),
                    "limit_bytes": WEIGHTS_BYTES,
                }
            )
        )


def write(runtime: str, directory: Path) -> tuple[Path, str]:
    """The model's file and its platform: one matrix of weights."""
    if runtime == "torch":
        return _write_torch(directory / "m.ts"), TORCHSCRIPT_PLATFORM
    return _write_onnx(directory / "m.onnx"), ONNX_PLATFORM


def _write_torch(path: Path) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.nn.Linear(ROWS, WIDTH, bias=False, device="meta").to_empty(device="cpu")
        torch.jit.script(module.eval()).save(str(path))
    return path


def _write_onnx(path: Path) -> Path:
    from onnx import TensorProto, helper

    # Beside the file: protobuf copies what is in it several times.
    np.zeros((ROWS, WIDTH), np.float32).tofile(path.with_name("weights"))
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[ROWS, WIDTH])
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="weights")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", ROWS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


if __name__ == "__main__":
    main(sys.argv[1])
