"""The classification extension: an output's k largest values as "value:index" strings."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from serving.core.types import DATATYPES
from serving.errors import InvalidRequest

NOT_CLASSIFIABLE: Final = frozenset({"BOOL", "BYTES"})


def classify(
    name: str, datatype: str, raw: memoryview | bytes, rows: int, k: int
) -> tuple[list[bytes], int]:
    """The top `k` of each of `rows` rows (1 for a model without batch dimension), largest first.

    Returns the elements, row by row, and how many there are in a row: `k`, or the row's length if
    that is less. Equal values keep the order of their indices. A value is written with the fewest
    digits that read back as the same number. Raises `InvalidRequest` for NaN, which has no rank.
    """
    values = _values(datatype, raw).reshape(rows, -1) if len(raw) else np.empty((rows, 0))
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise InvalidRequest(f"output {name!r} holds NaN, which classification cannot rank")
    length = values.shape[1]
    k = min(k, length)
    # A stable sort of the reversed row, read backwards: descending, equal values by ascending
    # index.
    order = length - 1 - np.argsort(values[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :k]
    top = np.take_along_axis(values, order, axis=1)
    pairs = zip(top.ravel(), order.ravel(), strict=True)
    return [f"{value!s}:{index}".encode() for value, index in pairs], k


def _values(datatype: str, raw: memoryview | bytes) -> np.ndarray[Any, np.dtype[Any]]:
    array = np.frombuffer(raw, DATATYPES[datatype].numpy)
    if datatype == "BF16":
        # BF16 is the upper half of FP32.
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
