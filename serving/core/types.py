"""Tensor and signature types of the Open Inference Protocol, shared by every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np

from serving.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class Datatype:
    """One tensor datatype of the protocol.

    `numpy` is the little-endian dtype of the raw form. BF16 has no numpy dtype: its raw form is
    viewed as uint16. BYTES has no fixed size (`itemsize` 0): its raw form is, per element, a u32
    length and the bytes.
    """

    name: str
    code: int
    numpy: np.dtype[Any] | None
    itemsize: int


def _fixed(name: str, code: int, dtype: str) -> Datatype:
    numpy = np.dtype(dtype)
    return Datatype(name, code, numpy, numpy.itemsize)


DATATYPES: Final[Mapping[str, Datatype]] = {
    d.name: d
    for d in (
        _fixed("BOOL", 1, "?"),
        _fixed("UINT8", 2, "<u1"),
        _fixed("UINT16", 3, "<u2"),
        _fixed("UINT32", 4, "<u4"),
        _fixed("UINT64", 5, "<u8"),
        _fixed("INT8", 6, "<i1"),
        _fixed("INT16", 7, "<i2"),
        _fixed("INT32", 8, "<i4"),
        _fixed("INT64", 9, "<i8"),
        _fixed("FP16", 10, "<f2"),
        _fixed("FP32", 11, "<f4"),
        _fixed("FP64", 12, "<f8"),
        Datatype("BF16", 13, np.dtype("<u2"), 2),
        Datatype("BYTES", 14, None, 0),
    )
}
DATATYPE_BY_CODE: Final[Mapping[int, Datatype]] = {d.code: d for d in DATATYPES.values()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output. `shape` includes any batch dimension; -1 is variable."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The protocol's metadata form."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TensorSpec:
        """Read `to_dict`'s form. Raises `ArtifactError` on an unknown datatype or a bad shape."""
        name, datatype, shape = raw.get("name"), raw.get("datatype"), raw.get("shape")
        if not isinstance(name, str) or not name:
            raise ArtifactError(f"signature: a tensor has no name: {dict(raw)!r}")
        if not isinstance(datatype, str) or datatype not in DATATYPES:
            raise ArtifactError(
                f"signature: tensor {name!r} has datatype {datatype!r}; "
                f"allowed: {', '.join(DATATYPES)}"
            )
        if not isinstance(shape, list | tuple) or not all(
            isinstance(d, int) and d >= -1 for d in shape
        ):
            raise ArtifactError(
                f"signature: tensor {name!r} has shape {shape!r}; expected a list of integers ≥ -1"
            )
        return cls(name, datatype, tuple(shape))


class Batch(StrEnum):
    """How a model treats its first dimension.

    `dynamic`: every input and output has a variable first dimension, along which requests are
    concatenated.
    `fixed`: the graph is frozen at `Signature.fixed_rows` rows; batches are padded up to it.
    `none`: no batch dimension; each request is one run.
    """

    DYNAMIC = "dynamic"
    FIXED = "fixed"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Signature:
    """Names, datatypes and shapes of a model's inputs and outputs, in the model's own order.

    For `dynamic` and `fixed` every shape's first dimension is -1: a client may send any number of
    rows up to the batch limit, for `fixed` up to `fixed_rows`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: Batch
    fixed_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The form of `signature.json` and of the route table."""
        return {
            "inputs": [t.to_dict() for t in self.inputs],
            "outputs": [t.to_dict() for t in self.outputs],
            "batch": self.batch.value,
            "fixed_rows": self.fixed_rows,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Signature:
        """Read `to_dict`'s form. Raises `ArtifactError` where it is malformed."""
        try:
            signature = cls(
                inputs=tuple(TensorSpec.from_dict(t) for t in raw["inputs"]),
                outputs=tuple(TensorSpec.from_dict(t) for t in raw["outputs"]),
                batch=Batch(raw["batch"]),
                fixed_rows=int(raw.get("fixed_rows", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"signature is malformed: {error!r}") from error
        if not signature.inputs or not signature.outputs:
            raise ArtifactError("signature: a model needs at least one input and one output")
        return signature
