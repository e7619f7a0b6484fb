"""Signatures and bodies that the protocol tests share."""

from __future__ import annotations

import json
from math import prod
from typing import Any

from serving.core.inference import InferRequest, Limits
from serving.core.protocol import InferCodec
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec

MAX_ROWS = 8
LIMITS = Limits(max_elements=1 << 20)


def signature(
    inputs: list[tuple[str, str, tuple[int, ...]]],
    outputs: list[tuple[str, str, tuple[int, ...]]] | None = None,
    batch: Batch = Batch.DYNAMIC,
    fixed_rows: int = 0,
) -> Signature:
    """A signature; without `outputs`, one FP32 output of ten."""
    outputs = outputs or [("p", "FP32", (-1, 10) if batch is not Batch.NONE else (10,))]
    return Signature(
        tuple(TensorSpec(*i) for i in inputs),
        tuple(TensorSpec(*o) for o in outputs),
        batch,
        fixed_rows,
    )


def codec(*args: Any, limits: Limits = LIMITS, **kwargs: Any) -> InferCodec:
    """A codec of `signature(…)` with at most `MAX_ROWS` rows."""
    return InferCodec("m", "3", signature(*args, **kwargs), MAX_ROWS, limits)


def tensor(name: str, datatype: str, shape: Any, data: Any = None, **more: Any) -> dict[str, Any]:
    """One entry of `inputs`."""
    entry = {"name": name, "datatype": datatype, "shape": shape, **more}
    return entry if data is None else {**entry, "data": data}


def body(*inputs: Any, **more: Any) -> bytes:
    """A JSON body."""
    return json.dumps({"inputs": list(inputs), **more}, separators=(",", ":")).encode()


def binary(
    *inputs: tuple[str, str, list[int], bytes], tail: bytes = b"", **more: Any
) -> tuple[bytes, int]:
    """A body with every input as binary, `tail` after them, and the length of its JSON."""
    entries = [
        tensor(name, datatype, shape, parameters={"binary_data_size": len(raw)})
        for name, datatype, shape, raw in inputs
    ]
    head = body(*entries, **more)
    return head + b"".join(raw for *_, raw in inputs) + tail, len(head)


def assert_fits(request: InferRequest, taken: Signature) -> None:
    """Everything that the gateway and the replica rely on in a decoded request."""
    batched = taken.batch is not Batch.NONE
    assert len(request.inputs) == len(request.shapes) == len(taken.inputs)
    assert (1 <= request.rows <= MAX_ROWS) if batched else request.rows == 1
    hash(request.key)
    for spec, shape, raw in zip(taken.inputs, request.shapes, request.inputs, strict=True):
        assert len(shape) == len(spec.shape)
        assert all(type(d) is int and d >= 0 for d in shape)
        assert all(e in (-1, d) for d, e in zip(shape, spec.shape, strict=True))
        assert not batched or shape[0] == request.rows
        view = memoryview(raw)
        assert view.contiguous
        assert view.itemsize == 1
        if itemsize := DATATYPES[spec.datatype].itemsize:
            assert len(raw) == prod(shape) * itemsize
        else:
            assert len(elements(view)) == prod(shape)


def elements(raw: memoryview | bytes) -> list[bytes]:
    """A plain reading of the raw form of BYTES, apart from the code under test."""
    found, rest = [], bytes(raw)
    while rest:
        length = int.from_bytes(rest[:4], "little")
        assert len(rest) >= 4 + length
        found.append(rest[4 : 4 + length])
        rest = rest[4 + length :]
    return found
