"""Convolutions in ever less room, down to too little for their results.

`python -m tests.gpu.convolution_child` prints for each kind and room what torch itself says, and
what became of the batch in the engine. cuDNN tries plan after plan, some of which need scratch
memory; where none is left, torch may end with another error than "out of memory".
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.artifacts import TORCHSCRIPT_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.base import Backend, RuntimeOptions, allocator_limit, load_model
from serving.replica.engine import Engine
from serving.replica.rules import rules_for
from serving.replica.work import Work

ROWS = 64
LIMIT_BYTES = 3 << 30
_BLOCK = 2 << 20
"""torch asks CUDA for large tensors in multiples of this."""
MODULES = {
    "2d": lambda: torch.nn.Conv2d(32, 32, 3, padding=1, bias=False),
    "2d, transposed": lambda: torch.nn.ConvTranspose2d(32, 32, 3, padding=1, bias=False),
    "3d": lambda: torch.nn.Conv3d(8, 8, 3, padding=1, bias=False),
}
SHAPES = {"2d": (32, 128, 128), "2d, transposed": (32, 128, 128), "3d": (8, 16, 64, 64)}
# Beside inputs and results, in shares of the results; the first has no room for the results.
SPARE = (-0.5, 0.0, 0.125, 0.5, 1.0, 2.0)


def main() -> None:
    kinds = {}
    for kind in MODULES:
        backend, x = load(kind, "cuda", LIMIT_BYTES)
        want = backend.run([x])[0]
        bare = MODULES[kind]().eval().to("cuda")
        kinds[kind] = [step(backend, bare, x, want, spare) for spare in SPARE]
        backend.close()
    print(json.dumps({"kinds": kinds}))


def load(kind: str, device: str, limit_bytes: int | None) -> tuple[Backend, np.ndarray]:
    """The model, and a batch for it."""
    shape = SHAPES[kind]
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, *shape)),),
        (TensorSpec("y", "FP32", (-1, *shape)),),
        Batch.DYNAMIC,
    )
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(directory) / "m.ts"
        torch.jit.script(MODULES[kind]().eval()).save(str(path))
        options = RuntimeOptions(device, memory_limit_bytes=limit_bytes)
        backend = load_model(path, TORCHSCRIPT_PLATFORM, options, signature)
    rng = np.random.default_rng(1)
    return backend, rng.standard_normal((ROWS, *shape), dtype=np.float32)


def step(
    backend: Backend, bare: torch.nn.Module, x: np.ndarray, want: np.ndarray, spare: float
) -> dict[str, Any]:
    """One batch where `spare` is left beside its inputs and results."""
    torch.cuda.empty_cache()
    assert backend.meter is not None
    room = (allocator_limit(backend.meter) or 0) - torch.cuda.memory_reserved()
    taken = int(room - x.nbytes - want.nbytes * (1 + spare)) // _BLOCK * _BLOCK
    ballast = torch.empty(taken, dtype=torch.uint8, device="cuda")
    said = _torch_says(bare, x)
    engine = Engine(backend, rules_for(backend, ROWS))
    work = Work([x], ROWS, arrived=0.0)
    engine.submit(work)
    found: dict[str, Any] = {
        "spare": spare,
        "torch_says": said,
        "error": None if work.error is None else str(work.error),
        "oom_batches": engine.oom_batches,
        "ceiling": engine.ceiling,
    }
    if work.error is None:
        found["off_by"] = float(np.abs(work.outputs[0] - want).max() / np.abs(want).max())
    del ballast
    return found


def _torch_says(bare: torch.nn.Module, x: np.ndarray) -> str | None:
    """The error of a convolution without the product, None where it runs."""
    said = None
    try:
        with torch.inference_mode():
            bare(torch.from_numpy(x).to("cuda"))
            torch.cuda.synchronize()
    except RuntimeError as error:
        said = str(error).splitlines()[0][:200]
    torch.cuda.empty_cache()
    return said


if __name__ == "__main__":
    main()
