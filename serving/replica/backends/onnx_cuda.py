"""CUDA's and cuDNN's libraries, loaded for ONNX Runtime from where their wheels lie."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path


def preload_libraries() -> str:
    """Load CUDA and cuDNN from where their wheels lie; "", or what ONNX Runtime says is missing.

    By itself it looks beside its own package and on the loader's path, but the wheels may be in
    another directory of `sys.path`.
    """
    import onnxruntime as ort

    major = (ort.cuda_version or "").partition(".")[0]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        ort.preload_dlls(cudnn=False, directory=_library_directory(f"cu{major}"))
        ort.preload_dlls(cuda=False, directory=_library_directory("cudnn"))
    return " ".join(said.getvalue().split())


def _library_directory(package: str) -> str | None:
    """Where `nvidia.<package>` has its libraries, None where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec is not None else None
    found = (Path(root) / package / "lib" for root in roots or ())
    return next((str(directory) for directory in found if directory.is_dir()), None)
