"""Between frames and arrays: an INFER frame to a `Work`, a finished `Work` to its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from serving.core.frames import (
    BATCH_ID,
    INFER_HEAD,
    NO_MERGE,
    RESULT_HEAD,
    FrameError,
    Kind,
    TensorEntry,
    decode_table,
    encode_json,
    encode_prefix,
    encode_table,
    padding,
    payload_spans,
)
from serving.core.tensors import U32, pack_bytes
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec
from serving.errors import InvalidRequest, ServingError
from serving.replica.backends.base import Array
from serving.replica.work import Work

Buffer = bytes | memoryview

# Batches of one client mostly look alike, so a table that was read and checked once is remembered.
_MAX_LAYOUTS: Final = 256
_MAX_CACHED_TABLE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each input lies in a payload, in signature order; dtype None stands for BYTES."""

    payload: int
    inputs: tuple[tuple[np.dtype[Any] | None, tuple[int, ...], int, int], ...]


class Codec:
    """Frames of one model."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._has_rows = signature.batch is not Batch.NONE
        self._has_bytes = any(t.datatype == "BYTES" for t in signature.outputs)
        self._layouts: dict[tuple[int, int, bytes], _Layout] = {}
        self._tables: dict[tuple[tuple[int, ...], ...], tuple[bytes, int]] = {}

    def decode(
        self, meta: memoryview, tensors: int, payload: memoryview, arrived: float
    ) -> tuple[int, Work | ServingError]:
        """The batch id and the work in an INFER frame, or why the work is refused.

        The work's arrays are views of `payload`, which must stay as it is until the work is
        finished; `arrived` is the frame's arrival on the monotonic clock. Raises `FrameError` where
        the frame itself is malformed.
        """
        if len(meta) < INFER_HEAD.size:
            raise FrameError(f"an INFER frame's meta has {len(meta)} bytes")
        batch_id, rows, flags, budget_us = INFER_HEAD.unpack_from(meta)
        if flags & ~NO_MERGE:
            raise FrameError(f"an INFER frame with unknown flags {flags:#x}")
        table = bytes(meta[INFER_HEAD.size :])
        layout = self._layouts.get((tensors, rows, table))
        try:
            if layout is None:
                layout = self._read_layout(table, tensors, rows, len(payload))
            if layout.payload != len(payload):
                raise FrameError(
                    f"payload of {len(payload)} bytes, the table says {layout.payload}"
                )
            inputs = [
                np.ndarray(shape, dtype, payload, start)
                if dtype is not None
                else split_bytes(payload[start:end], shape)
                for dtype, shape, start, end in layout.inputs
            ]
        except InvalidRequest as error:
            return batch_id, error
        except ValueError as error:
            # numpy bounds the size of an array even where a dimension of 0 makes it empty.
            return batch_id, InvalidRequest(f"a tensor's shape is out of bounds: {error}")
        deadline = arrived + budget_us * 1e-6 if budget_us else 0.0
        alone = bool(flags & NO_MERGE)
        return batch_id, Work(inputs, rows, arrived=arrived, deadline=deadline, alone=alone)

    def encode(self, batch_id: int, work: Work) -> list[Buffer]:
        """The buffers of the RESULT or FAILED frame that answers `work`."""
        if work.error is not None:
            return [failed(batch_id, work.error)]
        if self._has_bytes:
            outputs, table, size = self._raw_outputs(work.outputs)
        else:
            outputs = work.outputs
            table, size = self._table(outputs)
        meta = RESULT_HEAD.pack(
            batch_id, work.rows, work.run_rows, int(work.queue_s * 1e6), int(work.compute_s * 1e6)
        )
        head = encode_prefix(Kind.RESULT, len(outputs), len(meta) + len(table), size)
        buffers: list[Buffer] = [head + meta + table]
        for out in outputs:
            if out.nbytes:
                buffers.append(memoryview(out).cast("B"))  # type: ignore[arg-type]
            if pad := padding(out.nbytes):
                buffers.append(pad)
        return buffers

    def _read_layout(self, table: bytes, tensors: int, rows: int, payload: int) -> _Layout:
        entries = decode_table(table, 0, tensors)
        if sum(12 + 8 * len(e.shape) for e in entries) != len(table):
            raise FrameError("an INFER frame's table is longer than its tensors")
        spans = payload_spans(entries, payload)
        self._check(entries, rows)
        by_index = sorted(zip(entries, spans, strict=True), key=lambda pair: pair[0].index)
        layout = _Layout(
            payload,
            tuple((DATATYPES[e.datatype].numpy, e.shape, *span) for e, span in by_index),
        )
        if len(table) <= _MAX_CACHED_TABLE_BYTES:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[tensors, rows, table] = layout
        return layout

    def _check(self, entries: Sequence[TensorEntry], rows: int) -> None:
        """Raise `InvalidRequest` unless the tensors fit: the gateway should have seen to it."""
        specs = self._signature.inputs
        if sorted(e.index for e in entries) != list(range(len(specs))):
            raise InvalidRequest(
                f"a batch with {len(entries)} inputs that are not the model's {len(specs)}"
            )
        if rows < 1 or (rows != 1 and not self._has_rows):
            raise InvalidRequest(f"a batch of {rows} rows")
        for e in entries:
            self._check_tensor(e, specs[e.index], rows)

    def _check_tensor(self, entry: TensorEntry, spec: TensorSpec, rows: int) -> None:
        if entry.datatype != spec.datatype:
            raise InvalidRequest(
                f"input {spec.name!r} is {entry.datatype}, the model takes {spec.datatype}"
            )
        shape = entry.shape
        fits = len(shape) == len(spec.shape) and all(
            have >= 0 and want in (-1, have) for have, want in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(
                f"input {spec.name!r} has shape {list(shape)}, the model takes {list(spec.shape)}"
            )
        if self._has_rows and shape[0] != rows:
            raise InvalidRequest(f"input {spec.name!r} has {shape[0]} rows in a batch of {rows}")
        itemsize = DATATYPES[entry.datatype].itemsize
        if itemsize and entry.nbytes != itemsize * math.prod(shape):
            raise InvalidRequest(
                f"input {spec.name!r} has {entry.nbytes} bytes for shape {list(shape)}"
            )

    def _table(self, outputs: Sequence[Array]) -> tuple[bytes, int]:
        """The tensor table of `outputs` and the payload's length."""
        shapes = tuple(out.shape for out in outputs)
        known = self._tables.get(shapes)
        if known is None:
            known = _describe(self._signature.outputs, shapes, [out.nbytes for out in outputs])
            if len(self._tables) >= _MAX_LAYOUTS:
                self._tables.clear()
            self._tables[shapes] = known
        return known

    def _raw_outputs(self, outputs: Sequence[Array]) -> tuple[list[Array], bytes, int]:
        raw = [join_bytes(out) if out.dtype == object else out for out in outputs]
        shapes = tuple(out.shape for out in outputs)
        return raw, *_describe(self._signature.outputs, shapes, [out.nbytes for out in raw])


def failed(batch_id: int, error: ServingError) -> bytes:
    """A FAILED frame."""
    body = {"slug": error.slug, "message": str(error)}
    return encode_json(Kind.FAILED, body, BATCH_ID.pack(batch_id))


def _describe(
    specs: Sequence[TensorSpec], shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]
) -> tuple[bytes, int]:
    entries = [
        TensorEntry(i, spec.datatype, shape, size)
        for i, (spec, shape, size) in enumerate(zip(specs, shapes, sizes, strict=True))
    ]
    return encode_table(entries), sum(size + len(padding(size)) for size in sizes)


def split_bytes(raw: memoryview, shape: tuple[int, ...]) -> Array:
    """The elements of a BYTES tensor. Raises `InvalidRequest` where the lengths do not add up."""
    count = math.prod(shape)
    elements: list[bytes] = []
    at, end = 0, len(raw)
    while at < end and len(elements) < count:
        if end - at < U32.size:
            break
        (size,) = U32.unpack_from(raw, at)
        at += U32.size
        if size > end - at:
            break
        elements.append(bytes(raw[at : at + size]))
        at += size
    if at != end or len(elements) != count:
        raise InvalidRequest(
            f"a BYTES tensor of shape {list(shape)} does not hold {count} elements"
        )
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array.reshape(shape)


def join_bytes(array: Array) -> Array:
    """The raw form of a BYTES tensor, as UINT8."""
    return np.frombuffer(pack_bytes(array.reshape(-1).tolist()), np.uint8)
