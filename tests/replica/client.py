"""A blocking frame client: what a gateway says to a replica, over a real socket."""

from __future__ import annotations

import socket
import struct
from typing import Any

import numpy as np

from serving.core import frames
from serving.core.frames import Kind, TensorEntry
from serving.core.types import DATATYPES


class Failed(Exception):
    def __init__(self, slug: str, message: str) -> None:
        super().__init__(f"{slug}: {message}")
        self.slug, self.message = slug, message


class Client:
    """One connection. `infer` takes arrays in input order; BF16 as uint16 with `datatypes`."""

    def __init__(self, sock: socket.socket, role: str = "data") -> None:
        self.sock = sock
        sock.settimeout(90)
        self.batch_id = 0
        sock.sendall(frames.encode_json(Kind.HELLO, {"role": role, "gateway": "g1"}))
        kind, _, meta, _ = self.read_frame()
        self.hello = frames.decode_json(meta)
        if kind is not Kind.WELCOME:
            raise ConnectionRefusedError(self.hello["error"])

    @classmethod
    def unix(cls, path: str, role: str = "data") -> Client:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return cls(sock, role)
        except BaseException:
            sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def infer(self, *arrays: Any, rows: int | None = None, **options: Any) -> list[np.ndarray]:
        outputs, _ = self.infer_with_head(*arrays, rows=rows, **options)
        return outputs

    def infer_with_head(
        self,
        *arrays: Any,
        rows: int | None = None,
        budget_us: int = 0,
        datatypes: tuple[str, ...] = (),
    ) -> tuple[list[np.ndarray], tuple[int, ...]]:
        self.send_infer(*arrays, rows=rows, budget_us=budget_us, datatypes=datatypes)
        return self.read_result()

    def send_infer(
        self,
        *arrays: Any,
        rows: int | None = None,
        budget_us: int = 0,
        datatypes: tuple[str, ...] = (),
        flags: int = 0,
    ) -> None:
        self.batch_id += 1
        rows = len(arrays[0]) if rows is None else rows
        self.sock.sendall(infer_frame(self.batch_id, rows, arrays, budget_us, datatypes, flags))

    def read_result(self) -> tuple[list[np.ndarray], tuple[int, ...]]:
        kind, tensors, meta, payload = self.read_frame()
        if kind is Kind.FAILED:
            assert frames.BATCH_ID.unpack_from(meta) == (self.batch_id,)
            body = frames.decode_json(meta, frames.BATCH_ID.size)
            raise Failed(body["slug"], body["message"])
        assert kind is Kind.RESULT
        head = frames.RESULT_HEAD.unpack_from(meta)
        assert head[0] == self.batch_id
        entries = frames.decode_table(meta, frames.RESULT_HEAD.size, tensors)
        spans = frames.payload_spans(entries, len(payload))
        outputs = [from_raw(e, payload[a:b]) for e, (a, b) in zip(entries, spans, strict=True)]
        return outputs, head

    def ping(self) -> int:
        self.sock.sendall(frames.encode_prefix(Kind.PING, 0, 0, 0))
        kind, _, meta, _ = self.read_frame()
        assert kind is Kind.PONG
        return struct.unpack("<Q", meta)[0]

    def read_frame(self) -> tuple[Kind, int, bytes, bytearray]:
        kind, tensors, meta, payload = frames.decode_prefix(self._read(frames.PREFIX.size))
        return kind, tensors, bytes(self._read(meta)), self._read(payload)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            count = self.sock.recv_into(view[at:])
            if not count:
                raise EOFError("the replica closed the connection")
            at += count
        return data


def infer_frame(
    batch_id: int,
    rows: int,
    arrays: tuple[Any, ...],
    budget_us: int = 0,
    datatypes: tuple[str, ...] = (),
    flags: int = 0,
) -> bytes:
    entries, payload = [], b""
    for i, array in enumerate(arrays):
        array = np.asarray(array)
        raw = to_raw(array)
        datatype = datatypes[i] if datatypes else datatype_of(array)
        entries.append(TensorEntry(i, datatype, array.shape, len(raw)))
        payload += raw + frames.padding(len(raw))
    meta = frames.INFER_HEAD.pack(batch_id, rows, flags, budget_us) + frames.encode_table(entries)
    return frames.encode_prefix(Kind.INFER, len(entries), len(meta), len(payload)) + meta + payload


def datatype_of(array: np.ndarray) -> str:
    if array.dtype == object:
        return "BYTES"
    return next(d.name for d in DATATYPES.values() if d.numpy == array.dtype)


def to_raw(array: np.ndarray) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(e)) + e for e in array.reshape(-1))


def from_raw(entry: TensorEntry, raw: bytes) -> np.ndarray:
    if entry.datatype != "BYTES":
        return np.frombuffer(raw, DATATYPES[entry.datatype].numpy).reshape(entry.shape)
    elements, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        elements.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(entry.shape)
