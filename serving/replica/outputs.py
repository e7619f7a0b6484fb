"""Whether what a model returned is what its signature says."""

from __future__ import annotations

import numpy as np

from serving.core.types import DATATYPES, Batch, Signature
from serving.errors import ModelFailed
from serving.replica.backends.base import Array, as_raw


class OutputCheck:
    """The outputs of every run of one model, held against its signature."""

    def __init__(self, signature: Signature) -> None:
        self._has_rows = signature.batch is not Batch.NONE
        self._expected = [
            (spec.name, spec.datatype, _expected_dtype(spec.datatype), len(spec.shape))
            for spec in signature.outputs
        ]

    def checked(self, outputs: list[Array], rows: int) -> list[Array]:
        """`outputs` in wire form. Raises `ModelFailed` where they do not fit the signature."""
        if len(outputs) != len(self._expected):
            raise ModelFailed(
                f"the model returned {len(outputs)} outputs, "
                f"its signature has {len(self._expected)}"
            )
        raw = []
        for out, (name, datatype, dtype, ndim) in zip(outputs, self._expected, strict=True):
            if out.dtype != dtype:
                raise ModelFailed(
                    f"output {name!r} came back as {out.dtype}, its signature says {datatype}"
                )
            if out.ndim != ndim:
                raise ModelFailed(
                    f"output {name!r} came back with {out.ndim} dimensions, not {ndim}"
                )
            if self._has_rows and out.shape[0] != rows:
                raise ModelFailed(
                    f"output {name!r} came back with {out.shape[0]} rows for a batch of {rows}"
                )
            raw.append(as_raw(out))
        return raw


def _expected_dtype(datatype: str) -> np.dtype[np.generic]:
    return DATATYPES[datatype].numpy or np.dtype(object)
