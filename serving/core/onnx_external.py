"""Where an ONNX graph says its external data lies, read from the protobuf wire format.

The `onnx` package is not a runtime dependency, and parsing a whole model to learn a few strings
would copy its weights, so this walks only the messages on the way to `TensorProto.external_data`
(onnx.proto3: ModelProto → GraphProto → NodeProto → AttributeProto → TensorProto).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from serving.errors import ArtifactError

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_FIXED_BYTES: Final = {_I64: 8, _I32: 4}
_MAX_VARINT_BYTES: Final = 10

# Message → field number → message it holds; fields that are not on the way are skipped.
_SCHEMA: Final[Mapping[str, Mapping[int, str]]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def external_locations(model: memoryview) -> frozenset[str]:
    """Every `location` of external data in a serialised ONNX `ModelProto`, as written there.

    Raises `ArtifactError` if `model` is not a protobuf message.
    """
    locations: set[str] = set()
    waiting: list[tuple[str, memoryview]] = [("Model", model)]
    while waiting:
        message, data = waiting.pop()
        if message == "Entry":
            # StringStringEntryProto: key = 1, value = 2.
            entry = dict(_fields(data))
            if bytes(entry.get(1, b"")) == b"location":
                locations.add(bytes(entry.get(2, b"")).decode("utf-8", "replace"))
            continue
        inner = _SCHEMA[message]
        waiting += [(inner[number], part) for number, part in _fields(data) if number in inner]
    return frozenset(locations)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message as (field number, content); others are skipped."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
            continue
        if kind == _LEN:
            size, at = _varint(data, at)
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        else:
            raise ArtifactError("not an ONNX model: its bytes are not a protobuf message")
        if size > end - at:
            raise ArtifactError("not an ONNX model: it is cut short or not a protobuf message")
        if kind == _LEN:
            yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise ArtifactError("not an ONNX model: it is cut short or not a protobuf message")
