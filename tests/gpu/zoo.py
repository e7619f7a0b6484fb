"""Models of the zoo as the GPU's tests load them, without a registry."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.zoo import catalogue
from models.zoo.sizes import VOCABULARY, WIDTH
from serving.artifacts import EXPORT_PLATFORM, ONNX_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec

_SIGNATURES = {
    "resnet50": Signature(
        (TensorSpec("image", "FP32", (-1, 3, 224, 224)),),
        (TensorSpec("probabilities", "FP32", (-1, 1000)),),
        Batch.DYNAMIC,
    ),
    "transformer": Signature(
        (TensorSpec("tokens", "INT64", (-1, -1)),),
        (TensorSpec("embedding", "FP32", (-1, WIDTH)),),
        Batch.DYNAMIC,
    ),
}
_PLATFORMS = {"resnet50": ONNX_PLATFORM, "transformer": EXPORT_PLATFORM}


def build(name: str, directory: Path) -> tuple[Path, str, Signature]:
    """The file, its platform and its signature."""
    return catalogue.build(name, directory), _PLATFORMS[name], _SIGNATURES[name]


def inputs(name: str, rows: int) -> list[np.ndarray]:
    """Rows whose outputs differ by five times the tolerance of TF32 and more.

    Noise of one strength is one picture to random weights: only its contrast shows.
    """
    rng = np.random.default_rng(rows)
    if name == "resnet50":
        noise = rng.standard_normal((rows, 3, 224, 224), dtype=np.float32)
        return [noise * np.linspace(0.25, 4.0, rows, dtype=np.float32)[:, None, None, None]]
    return [rng.integers(0, VOCABULARY, (rows, 128))]
