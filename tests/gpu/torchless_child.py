"""An ONNX model on the GPU in a process without torch, as a replica of one is.

`python -m tests.gpu.torchless_child MODEL` prints the device and the model's answer. torch loads
CUDA's libraries when it is imported, and whoever comes after it finds them: a process that has it
does not show whether ONNX Runtime finds them by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from serving.artifacts import ONNX_PLATFORM
from serving.replica.backends.base import RuntimeOptions, load_model


def main(model: str) -> None:
    backend = load_model(Path(model), ONNX_PLATFORM, RuntimeOptions("cuda"), None)
    (answer,) = backend.run([np.full((2, 64), 0.5, np.float32)])
    print(
        json.dumps(
            {
                "device": backend.device,
                "torch": "torch" in sys.modules,
                "libraries": sorted(_libraries()),
                "answer": answer.tolist(),
            }
        )
    )


def _libraries() -> set[str]:
    """CUDA's and cuDNN's, as they were found."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return {path for path in paths if "/libcudart." in path or "/libcudnn.so" in path}


if __name__ == "__main__":
    main(sys.argv[1])
