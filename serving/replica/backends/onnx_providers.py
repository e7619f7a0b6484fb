"""Which of ONNX Runtime's execution providers a model runs on, and with which options."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from serving.errors import DeviceError
from serving.replica.backends.base import RuntimeOptions
from serving.replica.backends.cuda import missing_cuda, old_driver, require_cuda, require_driver

_log = logging.getLogger(__name__)

PROVIDERS: Final = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}


def choose_providers(options: RuntimeOptions) -> list[str]:
    """The execution providers that `options` ask for, best first. Raises `DeviceError`."""
    named = options.onnx.get("providers")
    if named:
        wants_gpu = any(name != "cpu" for name in named)
        if wants_gpu and options.device == "cpu":
            raise DeviceError(
                f"onnx.providers asks for {', '.join(named)} but device is cpu: change one of them"
            )
        if options.device == "cuda" and not wants_gpu:
            raise DeviceError(
                "device is cuda but onnx.providers names only cpu: change one of the two"
            )
        if wants_gpu:
            _require_gpu(options)
        chosen = [PROVIDERS[name] for name in named]
        return chosen if PROVIDERS["cpu"] in chosen else [*chosen, PROVIDERS["cpu"]]
    if options.device == "cuda":
        _require_gpu(options)
    if options.device == "cpu" or (options.device == "auto" and not _gpu_for_auto()):
        return [PROVIDERS["cpu"]]
    return [PROVIDERS["cuda"], PROVIDERS["cpu"]]


def _require_gpu(options: RuntimeOptions) -> None:
    import onnxruntime as ort

    require_cuda(asked_for(options))
    require_driver(asked_for(options), "ONNX Runtime", ort.cuda_version)


def _gpu_for_auto() -> bool:
    import onnxruntime as ort

    if missing_cuda():
        return False
    if reason := old_driver("ONNX Runtime", ort.cuda_version):
        _log.warning("%s: running on the CPU", reason)
    return reason is None


def asked_for(options: RuntimeOptions) -> str:
    """The setting that asks for a GPU, as an error names it."""
    named = options.onnx.get("providers")
    return f"onnx.providers: {', '.join(named)}" if named else f"device: {options.device}"


def with_options(providers: Sequence[str], limit_bytes: int | None) -> list[Any]:
    """The providers as a session takes them; the arena on the GPU gets `limit_bytes` at most."""
    # The arena grows by what is asked for, not by doubling: models share a GPU.
    cuda: dict[str, Any] = {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"}
    if limit_bytes is not None:
        cuda["gpu_mem_limit"] = limit_bytes
    return [(p, cuda) if p == PROVIDERS["cuda"] else p for p in providers]
