"""The models that are measured, and the requests that are sent for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from models.zoo.sizes import VOCABULARY, WIDTH
from serving.artifacts import EXPORT_PLATFORM, ONNX_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.base import Backend, RuntimeOptions, load_model

Rows = NDArray[Any]
_TOKENS: Final = 128


@dataclass(frozen=True, slots=True)
class Subject:
    """One model of the zoo. A request has `request_rows` rows, a run at most `max_size`."""

    name: str
    what: str
    platform: str
    signature: Signature
    request_rows: int
    max_size: int
    rows: Callable[[int], Rows]

    def load(self, file: Path, device: str) -> Backend:
        """The model as a replica runs it, without a replica."""
        return load_model(file, self.platform, RuntimeOptions(device), self.signature)

    def sizes(self) -> list[int]:
        """The batch sizes of the bare loop: powers of two up to `max_size`."""
        return [1 << i for i in range(self.max_size.bit_length())]

    def body(self) -> tuple[bytes, int]:
        """A request with its rows as raw bytes, and the length of its JSON part."""
        rows, spec = self.rows(self.request_rows), self.signature.inputs[0]
        raw = rows.tobytes()
        tensor = {
            "name": spec.name,
            "shape": list(rows.shape),
            "datatype": spec.datatype,
            "parameters": {"binary_data_size": len(raw)},
        }
        head = orjson.dumps({"parameters": {"binary_data_output": True}, "inputs": [tensor]})
        return head + raw, len(head)


def _images(rows: int) -> Rows:
    return np.random.default_rng(2).standard_normal((rows, 3, 224, 224), dtype=np.float32)


def _tokens(rows: int) -> Rows:
    return np.random.default_rng(3).integers(0, VOCABULARY, (rows, _TOKENS))


SUBJECTS: Final = {
    "resnet50": Subject(
        "resnet50",
        "ResNet-50, ONNX Runtime, 3×224×224 FP32 images",
        ONNX_PLATFORM,
        Signature(
            (TensorSpec("image", "FP32", (-1, 3, 224, 224)),),
            (TensorSpec("probabilities", "FP32", (-1, 1000)),),
            Batch.DYNAMIC,
        ),
        request_rows=8,
        max_size=128,
        rows=_images,
    ),
    "transformer": Subject(
        "transformer",
        f"encoder of 6 layers of width {WIDTH}, torch, sequences of {_TOKENS} tokens",
        EXPORT_PLATFORM,
        Signature(
            (TensorSpec("tokens", "INT64", (-1, -1)),),
            (TensorSpec("embedding", "FP32", (-1, WIDTH)),),
            Batch.DYNAMIC,
        ),
        request_rows=16,
        max_size=256,
        rows=_tokens,
    ),
}
