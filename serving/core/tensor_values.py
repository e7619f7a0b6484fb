"""Tensors in their raw form as numpy arrays of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from serving.core.types import DATATYPES

Array = npt.NDArray[Any]


def values_of(datatype: str, shape: tuple[int, ...], data: memoryview | bytes) -> Array | None:
    """The values of a raw tensor, as a view where possible; None for BYTES.

    BF16 comes as float32. Raises ValueError where `data` does not have the elements of `shape`.
    """
    dtype = DATATYPES[datatype].numpy
    if dtype is None:
        return None
    values = np.frombuffer(data, dtype).reshape(shape)
    if datatype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values
