"""The frame protocol between gateway and replica: length-prefixed binary frames, no pickle.

A frame is a 16-byte prefix, a `meta` part and a `payload` part (all numbers little-endian):

    prefix   kind u8 | version u8 | tensors u16 | meta bytes u32 | payload bytes u64
    HELLO    meta = JSON {"role": "data" | "heartbeat", "gateway": id}; first, gateway → replica
    WELCOME  meta = JSON {"model", "version", "digest", "replica"}; replica → gateway
    REFUSED  meta = JSON {"error"}; the connection closes
    INFER    meta = batch id u64 | rows u32 | flags u32 | budget µs u64 | tensor table
    RESULT   meta = batch id u64 | rows u32 | run rows u32 | queue µs u64 | compute µs u64 | table
    FAILED   meta = batch id u64 | JSON {"slug", "message"}
    PING     no meta; PONG meta = stalled µs u64: how long the current run has lasted, 0 when idle

A tensor table entry is `index u16 | datatype u8 | ndim u8 | bytes u64 | ndim x dim i64`; `index`
counts into the signature's inputs (INFER) or outputs (RESULT). The payload is the tensors' raw
forms in table order, each padded with zeros to a multiple of 8 bytes. A data connection carries at
most one batch at a time, so a gateway opens as many data connections to a replica as it wants
batches in flight there; heartbeats have their own connection, so a long run never looks like a dead
process.

`budget µs` is the time left until the last deadline in the batch (0: none): a duration, because
clocks differ between nodes. Row counts are per batch: for a `Batch.NONE` model, 1.

Of `flags`, bit 0 (`NO_MERGE`) asks for a run of its own: the replica must not join the batch with
others that wait, of whichever connection. All other bits are 0.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from serving.core.types import DATATYPE_BY_CODE, DATATYPES

PROTOCOL_VERSION: Final = 1
PREFIX: Final = struct.Struct("<BBHIQ")
INFER_HEAD: Final = struct.Struct("<QIIQ")
NO_MERGE: Final = 1
RESULT_HEAD: Final = struct.Struct("<QIIQQ")
BATCH_ID: Final = struct.Struct("<Q")
_ENTRY: Final = struct.Struct("<HBBQ")
_ALIGN: Final = 8
_PAD: Final = tuple(bytes(n) for n in range(_ALIGN))

MAX_META_BYTES: Final = 1 << 20
MAX_PAYLOAD_BYTES: Final = 1 << 33


class Kind(IntEnum):
    """Frame kinds."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    INFER = 4
    RESULT = 5
    FAILED = 6
    PING = 7
    PONG = 8


_KINDS: Final = {kind.value: kind for kind in Kind}


class FrameError(Exception):
    """The peer's bytes are no frame of this protocol. The connection is of no further use."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One row of a tensor table. `nbytes` is the raw form's length without padding."""

    index: int
    datatype: str
    shape: tuple[int, ...]
    nbytes: int


def padding(nbytes: int) -> bytes:
    """The zero bytes that follow `nbytes` of a tensor."""
    return _PAD[-nbytes % _ALIGN]


def encode_prefix(kind: Kind, tensors: int, meta: int, payload: int) -> bytes:
    """A frame's first 16 bytes."""
    return PREFIX.pack(kind, PROTOCOL_VERSION, tensors, meta, payload)


def decode_prefix(data: bytes | bytearray | memoryview) -> tuple[Kind, int, int, int]:
    """Kind, tensor count, meta bytes, payload bytes. Raises `FrameError`."""
    kind, version, tensors, meta, payload = PREFIX.unpack_from(data)
    if version != PROTOCOL_VERSION:
        raise FrameError(f"frame protocol version {version}, expected {PROTOCOL_VERSION}")
    if meta > MAX_META_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise FrameError(f"frame too large: meta {meta} bytes, payload {payload} bytes")
    known = _KINDS.get(kind)
    if known is None:
        raise FrameError(f"unknown frame kind {kind}")
    return known, tensors, meta, payload


def encode_table(entries: Sequence[TensorEntry]) -> bytes:
    """A tensor table."""
    parts = []
    for e in entries:
        parts.append(_ENTRY.pack(e.index, DATATYPES[e.datatype].code, len(e.shape), e.nbytes))
        parts.append(struct.pack(f"<{len(e.shape)}q", *e.shape))
    return b"".join(parts)


def decode_table(
    data: bytes | bytearray | memoryview, offset: int, count: int
) -> list[TensorEntry]:
    """Read `count` table entries from `data` at `offset`. Raises `FrameError`."""
    entries = []
    try:
        for _ in range(count):
            index, code, ndim, nbytes = _ENTRY.unpack_from(data, offset)
            offset += _ENTRY.size
            shape = struct.unpack_from(f"<{ndim}q", data, offset)
            offset += 8 * ndim
            entries.append(TensorEntry(index, DATATYPE_BY_CODE[code].name, shape, nbytes))
    except (struct.error, KeyError) as error:
        raise FrameError(f"malformed tensor table: {error!r}") from error
    return entries


def payload_spans(entries: Sequence[TensorEntry], payload: int) -> list[tuple[int, int]]:
    """(start, end) of each tensor in a payload. Raises `FrameError` where they do not fit."""
    spans, at = [], 0
    for e in entries:
        spans.append((at, at + e.nbytes))
        at += e.nbytes + len(padding(e.nbytes))
    if at != payload:
        raise FrameError(f"payload of {payload} bytes, its tensor table says {at}")
    return spans


def encode_json(kind: Kind, body: dict[str, Any], head: bytes = b"") -> bytes:
    """A whole frame without payload whose meta is `head` and JSON."""
    meta = head + json.dumps(body).encode()
    return encode_prefix(kind, 0, len(meta), 0) + meta


def decode_json(meta: bytes | bytearray | memoryview, offset: int = 0) -> dict[str, Any]:
    """The JSON object in a frame's meta. Raises `FrameError`."""
    try:
        body = json.loads(bytes(meta[offset:]))
    except ValueError as error:
        raise FrameError(f"malformed JSON in a frame: {error}") from error
    if not isinstance(body, dict):
        raise FrameError("a frame's JSON is not an object")
    return body
