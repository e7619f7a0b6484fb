"""What the engine needs of a model runtime, and the factory that picks one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from serving.artifacts import ONNX_PLATFORM, read_signature
from serving.core.replica import ReplicaSpec
from serving.core.types import Signature

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How to load a model.

    `device` is auto, cpu or cuda; the mappings hold the fields of OnnxConfig and TorchConfig.
    """

    device: str = "auto"
    onnx: Mapping[str, Any] = field(default_factory=dict)
    torch: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_spec(cls, spec: ReplicaSpec) -> RuntimeOptions:
        """The part of a replica's settings that a runtime needs."""
        return cls(spec.device, spec.onnx, spec.torch)


class Backend(Protocol):
    """A loaded model.

    `run` takes and gives one array per input and output, in the signature's order: little-endian,
    C-contiguous, BF16 as uint16, BYTES as object arrays of `bytes`. The arrays it returns stay
    valid until they are dropped, whatever runs next. It is called by one thread at a time, but not
    always by the same thread.

    `precision` is the datatype that the arithmetic is done in (FP32, TF32, FP16, …), which decides
    how closely golden outputs must be met.
    """

    signature: Signature
    platform: str
    device: str
    precision: str

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the model once. Raises `InvalidRequest` for bad values, or the runtime's error."""

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


def as_raw(array: Array) -> Array:
    """`array` as the wire needs it: C-contiguous and little-endian."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # Not np.ascontiguousarray: it turns a scalar into one row.
    return array if array.flags.c_contiguous else array.copy(order="C")
