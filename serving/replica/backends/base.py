"""What the engine needs of a model runtime, and the factory that picks one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from serving.artifacts import ONNX_PLATFORM, read_signature
from serving.core.replica import GpuLease, ReplicaSpec
from serving.core.types import Signature
from serving.errors import DeviceError
from serving.replica.backends.meters import Meter

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How to load a model.

    `device` is auto, cpu or cuda; the mappings hold the fields of OnnxConfig and TorchConfig.
    `memory_limit_bytes` is the most GPU memory that the process may hold, None for no limit.
    """

    device: str = "auto"
    onnx: Mapping[str, Any] = field(default_factory=dict)
    torch: Mapping[str, Any] = field(default_factory=dict)
    memory_limit_bytes: int | None = None

    @classmethod
    def from_spec(cls, spec: ReplicaSpec, lease: GpuLease | None = None) -> RuntimeOptions:
        """The part of a replica's settings that a runtime needs.

        Who holds a lease of a GPU runs on it: `auto` is then `cuda`.
        """
        if lease is None:
            return cls(spec.device, spec.onnx, spec.torch)
        device = "cuda" if spec.device == "auto" else spec.device
        return cls(device, spec.onnx, spec.torch, lease.bytes)


class Backend(Protocol):
    """A loaded model.

    `run` takes and gives one array per input and output, in the signature's order: little-endian,
    C-contiguous, BF16 as uint16, BYTES as object arrays of `bytes`. The arrays it returns stay
    valid until they are dropped, whatever runs next. It is called by one thread at a time, but not
    always by the same thread.

    `precision` is the datatype that the arithmetic is done in (FP32, TF32, FP16, …), which decides
    how closely golden outputs must be met. `meter` reads the GPU memory that the process holds; it
    is None on the CPU.
    """

    signature: Signature
    platform: str
    device: str
    precision: str
    meter: Meter | None

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the model once.

        Raises `InvalidRequest` for bad values, `MemoryExhausted` where fewer rows might fit,
        `FatalDeviceError` where this process can use the device no more, or the runtime's error.
        """

    def check(self) -> None:
        """Make sure that the model still is on `device` and that it works.

        Raises `DeviceError` if the model is elsewhere, `FatalDeviceError` if the device is of no
        more use to this process. Waits for no run.
        """

    def close(self) -> None:
        """Free the model."""


def load_backend(bundle: Path, options: RuntimeOptions) -> Backend:
    """Load the model of a bundle that has been verified against its digest.

    A `.pt2` is unpickled by its loader, so loading one is running code: never call this on files
    whose digest was not checked. Raises `ArtifactError` if the runtime refuses the file,
    `DeviceError` if the device that `options` asks for is not there.
    """
    info = read_signature(bundle)
    return load_model(bundle / info.model_file, info.platform, options, info.signature)


def load_model(
    model: Path, platform: str, options: RuntimeOptions, signature: Signature | None
) -> Backend:
    """`load_backend` for one file; without a signature, with the one that the file declares."""
    if platform == ONNX_PLATFORM:
        from serving.replica.backends.onnx import OnnxBackend

        return OnnxBackend(model, options, signature)
    from serving.replica.backends.torch import TorchBackend

    return TorchBackend(model, platform, options, signature)


def one_line(error: BaseException) -> str:
    """A runtime's error as it fits a reply: the line with the reason, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # TorchScript's interpreter puts its traceback first and the reason last.
    reason = lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
    return reason[:300]


def allocator_limit(meter: Meter) -> int | None:
    """How many bytes a runtime's allocator may take, beside what the process already holds.

    None where there is no limit. Raises `DeviceError` if nothing is left.
    """
    if meter.limit_bytes is None:
        return None
    left = meter.limit_bytes - meter.context_bytes
    if left <= 0:
        raise DeviceError(
            f"this replica may hold {meter.limit_bytes} bytes of {meter.uuid}, and CUDA's context "
            f"alone takes {meter.context_bytes}: give the model more (gpu_memory_bytes)"
        )
    return left


def does_not_fit(model: Path, meter: Meter, requested_bytes: int | None) -> DeviceError:
    """The error of a model whose weights do not fit into the memory that it may use."""
    limit = f", of which it may hold {meter.limit_bytes} bytes" if meter.limit_bytes else ""
    asked = f" ({requested_bytes} bytes more were asked for)" if requested_bytes else ""
    return DeviceError(
        f"{model}: does not fit into the memory of {meter.device_type} ({meter.uuid}){limit}"
        f"{asked}: give it more (gpu_memory_bytes), a larger GPU or a smaller dtype"
    )


def require_loaded_within_limit(model: Path, meter: Meter) -> None:
    """Raise `DeviceError` where a model that has loaded holds more than it may.

    ONNX Runtime's limit is for what its arena grows by: weights pass it, and once they are beyond
    it there is none. Where the reading may include a neighbour's memory, this is a warning.
    """
    if meter.limit_bytes is None or (over := meter.held_bytes() - meter.limit_bytes) <= 0:
        return
    error = does_not_fit(model, meter, over)
    if meter.exact:
        raise error
    _log.warning("%s (if no neighbour on the GPU grew meanwhile)", error)


def as_raw(array: Array) -> Array:
    """`array` as the wire needs it: C-contiguous and little-endian."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # Not np.ascontiguousarray: it turns a scalar into one row.
    return array if array.flags.c_contiguous else array.copy(order="C")
