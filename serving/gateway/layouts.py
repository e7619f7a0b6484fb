"""Tensor tables of batches, written and read once a shape.

Batches of one model mostly look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from serving.core import frames
from serving.core.frames import FrameError, TensorEntry
from serving.core.inference import InferRequest
from serving.core.types import Batch, Signature

# Past this many layouts all are dropped: shapes are up to clients and models.
_MAX_LAYOUTS: Final = 256
_MAX_KEPT_TABLE_BYTES: Final = 4096

Buffer = bytes | memoryview


@dataclass(slots=True)
class Outgoing:
    """A batch's tensor table, how many tensors it has, their padding, and the payload's length."""

    table: bytes
    tensors: int
    pads: tuple[bytes, ...]
    payload: int


class OutgoingLayouts:
    """Layouts of the batches of one signature."""

    def __init__(self, signature: Signature) -> None:
        self._specs = signature.inputs
        self._batched = signature.batch is not Batch.NONE
        # The length of a BYTES tensor does not follow from its shape.
        self._same = all(spec.datatype != "BYTES" for spec in signature.inputs)
        self._known: dict[tuple[int, tuple[tuple[int, ...], ...]], Outgoing] = {}

    def of(self, rows: int, batch: Sequence[InferRequest]) -> Outgoing:
        """The layout of `batch`, which has `rows` rows in all and one key."""
        shapes = batch[0].shapes
        if not self._same:
            return self._make(rows, shapes, batch)
        layout = self._known.get((rows, shapes))
        if layout is None:
            if len(self._known) >= _MAX_LAYOUTS:
                self._known.clear()
            layout = self._known[rows, shapes] = self._make(rows, shapes, batch)
        return layout

    def _make(
        self, rows: int, shapes: Sequence[tuple[int, ...]], batch: Sequence[InferRequest]
    ) -> Outgoing:
        entries = []
        for i, (spec, shape) in enumerate(zip(self._specs, shapes, strict=True)):
            whole = (rows, *shape[1:]) if self._batched else shape
            nbytes = sum(len(request.inputs[i]) for request in batch)
            entries.append(TensorEntry(i, spec.datatype, whole, nbytes))
        pads = tuple(frames.padding(entry.nbytes) for entry in entries)
        payload = sum(entry.nbytes for entry in entries) + sum(map(len, pads))
        return Outgoing(frames.encode_table(entries), len(entries), pads, payload)


@dataclass(slots=True)
class Incoming:
    """What a tensor table says: the tensors, where each lies in the payload, its length."""

    entries: list[TensorEntry]
    spans: list[tuple[int, int]]
    payload: int


class IncomingLayouts:
    """Layouts of the answers of one replica."""

    def __init__(self) -> None:
        self._known: dict[bytes, Incoming] = {}

    def read(self, table: bytes, tensors: int, payload: int) -> Incoming:
        """The layout in `table`. Raises `FrameError` where it does not fit the payload."""
        layout = self._known.get(table)
        if layout is None:
            entries = frames.decode_table(table, 0, tensors)
            layout = Incoming(entries, frames.payload_spans(entries, payload), payload)
            if len(table) <= _MAX_KEPT_TABLE_BYTES:
                if len(self._known) >= _MAX_LAYOUTS:
                    self._known.clear()
                self._known[table] = layout
        if payload != layout.payload or tensors != len(layout.entries):
            raise FrameError(
                f"a payload of {payload} bytes with {tensors} tensors; the tensor table says "
                f"{layout.payload} and {len(layout.entries)}"
            )
        return layout
