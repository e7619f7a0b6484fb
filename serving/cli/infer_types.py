"""Inputs of `serving infer` in their datatypes: what a conversion changes is said, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def to_wire(datatype: str, value: Any, *, typed: bool) -> tuple[Array, str]:
    """The array in the wire's form, and what became of its numbers, or nothing to say.

    Little-endian; BF16 as uint16; BYTES as objects. `typed`: the numbers have types, which those of
    JSON have not. Raises `ValueError` or `TypeError` where values do not survive.
    """
    import numpy as np

    from serving.core.types import DATATYPES

    if datatype == "BYTES":
        return np.asarray(value, dtype=object), ""
    given = np.asarray(value)
    if typed and given.dtype.kind not in "biuf":
        raise ValueError(f"it holds {given.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        if datatype == "BF16":
            wire = _bfloat16(given.astype(np.float32))
            kept = (wire.astype(np.uint32) << 16).view(np.float32)
        else:
            wire = kept = np.ascontiguousarray(given, dtype=DATATYPES[datatype].numpy)
        _check(given, kept, typed=typed)
        return wire, _conversion(datatype, given, kept) if typed else ""


def _check(given: Array, kept: Array, *, typed: bool) -> None:
    import numpy as np

    if kept.dtype.kind in "iub":
        survived = np.array_equal(kept, given)
    elif typed and given.dtype.kind in "iu":
        # Back to integers too: a comparison of both as floats would round the given ones.
        survived = np.array_equal(kept, given) and np.array_equal(kept.astype(given.dtype), given)
    else:
        survived = True
    if not survived:
        raise ValueError(f"a value of {given.dtype} does not fit")
    if given.dtype.kind == "f" and np.any(np.isfinite(given) & ~np.isfinite(kept)):
        raise ValueError(f"a value of {given.dtype} is out of range")


def _conversion(datatype: str, given: Array, kept: Array) -> str:
    import numpy as np

    if (given.dtype.kind, given.itemsize) == (kept.dtype.kind, kept.itemsize) and (
        datatype != "BF16"
    ):
        return ""
    rounded = int(np.sum((kept != given) & ~(np.isnan(kept) & np.isnan(given))))
    how = f", {rounded} of {given.size} values rounded" if rounded else " without loss"
    return f"{given.dtype} converted to {datatype}{how}"


def _bfloat16(value: Array) -> Array:
    """The upper half of each float32, rounded to nearest even."""
    import numpy as np

    bits = np.ascontiguousarray(value).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
