"""What has to be there before anything is measured or tested on a GPU: all that is absent at once.

The standard library alone is imported until the packages are known to be there.
"""

from __future__ import annotations

import ctypes
import re
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from serving.replica.backends.cuda import missing_cuda

_PROJECT: Final = Path(__file__).resolve().parents[2] / "pyproject.toml"
_CUDA_PROVIDER: Final = "CUDAExecutionProvider"
ZOO_PACKAGES: Final = ("onnx",)
"""What the zoo needs beside the project's own dependencies, to write its models."""


def problem() -> str | None:
    """What the benchmark lacks on this machine, as one sentence; None where it lacks nothing."""
    absent = absent_packages(*ZOO_PACKAGES)
    lacking = [f"these packages are not installed: {', '.join(absent)}"] if absent else []
    # Builds without CUDA are the next thing to look at, not what to add to an absent driver.
    lacking += _driver() or ([] if absent else _runtimes())
    return f"cannot run here: {'; '.join(lacking)}" if lacking else None


def absent_packages(*more: str) -> list[str]:
    """Which of the project's dependencies, and of `more`, are not installed."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w.-]+", line) for line in project["dependencies"]]
    return [name for name in [*(found[0] for found in names if found), *more] if _absent(name)]


def _absent(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return True
    return False


def _driver() -> list[str]:
    reason = missing_cuda()
    lacking = [f"there is no CUDA GPU: {reason}"] if reason else []
    if not reason:
        try:
            ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            lacking.append("NVML, which comes with the driver, is absent (libnvidia-ml.so.1)")
    return lacking


def _runtimes() -> list[str]:
    """What is wrong with torch and ONNX Runtime as they are installed, on a machine with a GPU."""
    found = {}
    lacking = []
    for name in ("torch", "onnxruntime"):
        try:
            found[name] = import_module(name)
        except (ImportError, OSError) as error:
            lacking.append(f"{name} cannot be imported: {error}")
    torch, ort = found.get("torch"), found.get("onnxruntime")
    if torch is not None and torch.version.cuda is None:
        lacking.append(f"torch {torch.__version__} is built without CUDA")
    elif torch is not None and not torch.cuda.is_available():
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda},"
        lacking.append(f"{built} finds no device; the driver may be too old for it")
    if ort is not None and _CUDA_PROVIDER not in ort.get_available_providers():
        lacking.append(f"onnxruntime {ort.__version__} has no {_CUDA_PROVIDER}")
    return lacking
