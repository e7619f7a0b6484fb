"""Which of ONNX Runtime's execution providers a model runs on, and with which options."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from serving.errors import DeviceError
from serving.replica.backends.base import RuntimeOptions
from serving.replica.backends.cuda import missing_cuda, old_driver, require_cuda, require_driver

if TYPE_CHECKING:
    import onnxruntime as ort

_log = logging.getLogger(__name__)

RECORD_NODES: Final = "session.record_ep_graph_assignment_info"
"""The session option by which a session knows which node runs on which provider."""

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
        return [PROVIDERS[name] for name in _completed(named)]
    if options.device == "cuda":
        _require_gpu(options)
    if options.device == "cpu" or (options.device == "auto" and not _gpu_for_auto()):
        return [PROVIDERS["cpu"]]
    return [PROVIDERS["cuda"], PROVIDERS["cpu"]]


def _completed(named: Sequence[str]) -> list[str]:
    """With what takes the nodes that the last of them cannot run."""
    if "cpu" in named:
        return list(named)
    # What TensorRT leaves would run on the CPU otherwise, and wait for a copy each time.
    return [*named, *(["cuda"] if "cuda" not in named else []), "cpu"]


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


def log_nodes_on_cpu(model: Path, session: ort.InferenceSession) -> None:
    """Say which nodes run on the CPU though the model is on a GPU; see `RECORD_NODES`.

    ONNX Runtime puts some there on purpose, as the arithmetic of shapes, and all operators of which
    a provider has no kernel.
    """
    nodes = {g.ep_name: g.get_nodes() for g in session.get_provider_graph_assignment_info()}
    on_cpu = nodes.get(PROVIDERS["cpu"], ())
    if not on_cpu:
        return
    total = sum(map(len, nodes.values()))
    level = logging.WARNING if 2 * len(on_cpu) >= total else logging.INFO
    kinds = ", ".join(sorted({node.op_type for node in on_cpu}))
    _log.log(level, "%s: %d of %d nodes run on the CPU: %s", model, len(on_cpu), total, kinds)


def with_options(providers: Sequence[str], limit_bytes: int | None) -> list[Any]:
    """The providers as a session takes them; the arena on the GPU gets `limit_bytes` at most."""
    # The arena grows by what is asked for, not by doubling: models share a GPU.
    cuda: dict[str, Any] = {"device_id": 0, "arena_extend_strategy": "kSameAsRequested"}
    if limit_bytes is not None:
        cuda["gpu_mem_limit"] = limit_bytes
    return [(p, cuda) if p == PROVIDERS["cuda"] else p for p in providers]
