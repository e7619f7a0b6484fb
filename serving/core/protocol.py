"""The Open Inference Protocol v2 over REST: bodies to checked requests, outputs to bodies.

A codec belongs to one model version and precomputes what its signature determines. A request is
refused here, before it can join a batch, unless it fits that signature wholly. Where the protocol
is silent:

- Members that it does not define are refused, so that a misspelt one is not ignored. `model_name`
  and `model_version`, which some clients repeat in the body, are ignored: the URL decides. Unknown
  `parameters` are the client's own and let through.
- null stands for an absent optional member; clients that serialise records send it.
- An empty `outputs` list asks for all outputs.
- JSON numbers are strict: no bools among numbers, no 1.0 for an integer, nothing out of the
  datatype's range. An integer is taken for a floating-point input. FP16 and BF16 have no JSON form.
- NaN and infinity have none either. An output that holds one is refused in JSON, never sent as
  null.
- A raw body (header value 0) for a BYTES input is one element, without its length prefix.

Source: the protocol's REST and binary-data documents and the observed behaviour of its clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson

from serving.core.inference import (
    DEFAULT_LIMITS,
    FIXED_SHAPES_KEY,
    NO_PARAMETERS,
    EncodedResponse,
    InferRequest,
    Limits,
    OutputTensor,
    RequestedOutput,
    row_limit,
)
from serving.core.parameters import read_bool, read_integer, read_parameters, refuse_unknown
from serving.core.requested import OutputSelector
from serving.core.responses import ResponseEncoder
from serving.core.tensors import TensorReader, pack_bytes, show
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import InvalidRequest, PayloadTooLarge

__all__ = [
    "EncodedResponse",
    "InferCodec",
    "InferRequest",
    "Limits",
    "OutputTensor",
    "RequestedOutput",
    "encode_error",
    "parse_json_length",
]

_REQUEST: Final = "the request"
_STRINGS: Final = ("id", "model_name", "model_version")
_MEMBERS: Final = frozenset({*_STRINGS, "parameters", "inputs", "outputs"})
_INPUT_MEMBERS: Final = frozenset({"name", "shape", "datatype", "parameters", "data"})
# An input with data and no parameters has these and no other members.
_PLAIN_MEMBERS: Final = 4
# JSON longer than this has its volume checked before it is parsed: a parser spends seconds and
# gigabytes on some tens of megabytes of empty lists. Beside the data it may hold so many values.
_LARGE_JSON: Final = 1 << 18
_OTHER_VALUES: Final = 1 << 16
# Levels of JSON around an input's data: the request, its inputs, the input.
_LEVELS_ABOVE_DATA: Final = 3
# Levels of JSON down to the parameters of the request, and of an input.
_LEVELS_OF_PARAMETERS: Final = 2
_LEVELS_OF_TENSOR_PARAMETERS: Final = 4
_MAX_LENGTH_DIGITS: Final = 18
_NOTHING: Final = memoryview(b"")
_UNREAD: Final[tuple[int, ...]] = (-1,)


def parse_json_length(value: bytes | None) -> int | None:
    """The value of Inference-Header-Content-Length, None where absent. Raises `InvalidRequest`."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > _MAX_LENGTH_DIGITS:
        shown = show(value.decode("latin-1"))
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {shown}; it takes a number of bytes from 0"
        )
    return int(value)


def encode_error(message: str) -> bytes:
    """The protocol's error body."""
    # A message may quote what is not Unicode: a header or a path.
    return orjson.dumps({"error": message.encode("utf-8", "replace").decode()})


class InferCodec:
    """Decodes requests for, and encodes responses of, one model version.

    `max_rows` is the batch limit in force, ignored for a model without batch dimension. A codec is
    used from one thread at a time.
    """

    def __init__(
        self,
        model: str,
        version: str,
        signature: Signature,
        max_rows: int,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        rows = row_limit(signature, max_rows)
        nesting = limits.max_json_depth - _LEVELS_ABOVE_DATA
        self._readers = tuple(
            TensorReader(i, spec, rows, _most_elements(spec, limits), nesting)
            for i, spec in enumerate(signature.inputs)
        )
        self._reader_of = {reader.name: reader for reader in self._readers}
        self._max_depth = limits.max_json_depth
        self._max_json_bytes = limits.max_json_bytes
        self._names = ", ".join(self._reader_of)
        self._batched = signature.batch is not Batch.NONE
        first = 1 if self._batched else 0
        variable = any(d < 0 for spec in signature.inputs for d in spec.shape[first:])
        self._keyed = self._batched and variable
        # Strings may hold any of the characters that are counted.
        self._countable = all(spec.datatype != "BYTES" for spec in signature.inputs)
        volumes = [reader.json_volume() for reader in self._readers]
        self._max_values = sum(elements for elements, _ in volumes) + _OTHER_VALUES
        self._max_containers = sum(lists for _, lists in volumes) + _OTHER_VALUES
        self._selector = OutputSelector(signature, limits)
        self._encoder = ResponseEncoder(model, version, signature)

    def encode(self, request: InferRequest, outputs: Sequence[OutputTensor]) -> EncodedResponse:
        """The response to `request`. `outputs` holds at least those asked for, in any order.

        Raises `ModelFailed` where an output is missing or does not fit the signature,
        `InvalidRequest` where it has no such form as was asked for (NaN in JSON).
        """
        return self._encoder.encode(request, outputs)

    def encode_batch(
        self,
        requests: Sequence[InferRequest],
        shapes: Sequence[tuple[int, ...]],
        tensors: Sequence[memoryview],
    ) -> list[bytes] | None:
        """The bodies of the responses to a batch, at once; None where each is to be encoded alone.

        See `ResponseEncoder.encode_batch`.
        """
        return self._encoder.encode_batch(requests, shapes, tensors)

    def decode(self, body: bytes | bytearray | memoryview, json_length: int | None) -> InferRequest:
        """Check a body against the signature.

        `json_length` is the Inference-Header-Content-Length: how much of the body is JSON, None for
        all, 0 for a raw body. The request's inputs are views of `body` where it carries them as
        binary: it must not change while they are in use. Raises `InvalidRequest`,
        `PayloadTooLarge` and `Unsupported`, and nothing else.
        """
        if json_length == 0:
            return self._decode_raw(memoryview(body))
        text, tail = body, _NOTHING
        if json_length is not None and json_length != len(body):
            if json_length > len(body):
                raise InvalidRequest(
                    f"Inference-Header-Content-Length is {json_length}, "
                    f"the body has {len(body)} bytes"
                )
            text, tail = body[:json_length], memoryview(body)[json_length:]
        if isinstance(text, memoryview):
            text = bytes(text)
        if len(text) > _LARGE_JSON:
            self._check_volume(text)
        message = _parse(text)
        entries = message.get("inputs")
        if type(entries) is not list or len(entries) != len(self._readers):
            raise self._wrong_inputs(entries)
        inputs, shapes = self._read_inputs(entries, text, tail)
        request = self._request(inputs, shapes)
        if len(message) > 1:
            self._read_envelope(message, request)
        elif self._selector.lacks_json:
            self._selector.all(binary=False)
        return request

    def _check_volume(self, text: bytes | bytearray) -> None:
        if len(text) > self._max_json_bytes:
            raise PayloadTooLarge(
                f"the request has {len(text)} bytes of JSON, at most {self._max_json_bytes} are "
                "allowed; send large tensors as binary data"
            )
        if not self._countable:
            return
        values, containers = text.count(b","), text.count(b"[") + text.count(b"{")
        if values > self._max_values or containers > self._max_containers:
            raise InvalidRequest(
                f"the request holds {values} JSON values in {containers} lists and objects; its "
                f"inputs need at most {self._max_values} in {self._max_containers}"
            )

    def _read_inputs(
        self, entries: list[Any], text: bytes | bytearray, tail: memoryview
    ) -> tuple[list[memoryview | bytes], tuple[tuple[int, ...], ...]]:
        # A JSON bool is one of two literals, and many bodies have not even a letter of theirs.
        may_hold_bools = b"r" in text or b"l" in text
        inputs: list[memoryview | bytes] = [_NOTHING] * len(entries)
        shapes = [_UNREAD] * len(entries)
        at = 0
        for position, entry in enumerate(entries):
            if type(entry) is not dict:
                raise InvalidRequest(f"inputs must hold objects, found {show(entry)}")
            name = entry.get("name")
            reader = self._readers[position]
            if name != reader.name:
                reader = self._reader_named(name)
            index = reader.index
            if shapes[index] is not _UNREAD:
                raise InvalidRequest(f"{reader.where} is given more than once")
            if entry.get("datatype") != reader.datatype:
                raise InvalidRequest(
                    f"{reader.where} has datatype {show(entry.get('datatype'))}, "
                    f"expected {reader.datatype}"
                )
            extent = reader.check_shape(entry.get("shape"))
            shapes[index] = extent.shape
            data = entry.get("data")
            plain = data is not None and len(entry) == _PLAIN_MEMBERS
            size = None if plain else self._binary_size(entry, reader)
            if size is None:
                inputs[index] = reader.pack_json(data, extent, may_hold_bools)
                continue
            raw = tail[at : at + size]
            if len(raw) != size:
                raise InvalidRequest(
                    f"{reader.where} has binary_data_size {size}, {len(raw)} bytes are left for it "
                    "in the body after what Inference-Header-Content-Length says is JSON"
                )
            reader.check_binary(raw, extent)
            inputs[index] = raw
            at += size
        if at != len(tail):
            raise InvalidRequest(
                f"the body has {len(tail) - at} bytes left over after its last binary input"
            )
        return inputs, tuple(shapes)

    def _reader_named(self, name: Any) -> TensorReader:
        reader = self._reader_of.get(name) if type(name) is str else None
        if reader is None:
            raise InvalidRequest(f"the model has no input {show(name)}; it takes {self._names}")
        return reader

    def _wrong_inputs(self, entries: Any) -> InvalidRequest:
        if type(entries) is not list:
            found = "none" if entries is None else show(entries)
            return InvalidRequest(f"the request must have a list of inputs, found {found}")
        return InvalidRequest(
            f"the request has {len(entries)} inputs, the model takes {len(self._readers)}: "
            f"{self._names}"
        )

    def _binary_size(self, entry: dict[str, Any], reader: TensorReader) -> int | None:
        """An input's binary_data_size, None where its data is in the JSON."""
        where = reader.where
        refuse_unknown(where, entry, _INPUT_MEMBERS)
        parameters = read_parameters(
            where, entry.get("parameters"), self._max_depth - _LEVELS_OF_TENSOR_PARAMETERS
        )
        size = parameters.get("binary_data_size")
        has_data = entry.get("data") is not None
        if has_data == (size is not None):
            found = "both" if has_data else "neither"
            raise InvalidRequest(
                f"{where} must have either data or a binary_data_size, found {found}"
            )
        if size is not None and (type(size) is not int or size < 0):
            raise InvalidRequest(
                f"{where} has binary_data_size {show(size)}; it takes a number of bytes from 0"
            )
        return size

    def _check_rows(self, shapes: tuple[tuple[int, ...], ...]) -> int:
        rows = shapes[0][0]
        for reader, shape in zip(self._readers, shapes, strict=True):
            if shape[0] != rows:
                raise InvalidRequest(
                    f"{reader.where} has {shape[0]} rows, {self._readers[0].where} has {rows}; "
                    "all inputs must have the same number"
                )
        return rows

    def _request(
        self, inputs: list[memoryview | bytes], shapes: tuple[tuple[int, ...], ...]
    ) -> InferRequest:
        if not self._batched:
            return InferRequest(
                None, 1, inputs, FIXED_SHAPES_KEY, shapes, 0, 0, None, NO_PARAMETERS
            )
        rows = shapes[0][0] if len(shapes) == 1 else self._check_rows(shapes)
        key = tuple([shape[1:] for shape in shapes]) if self._keyed else FIXED_SHAPES_KEY
        return InferRequest(None, rows, inputs, key, shapes, 0, 0, None, NO_PARAMETERS)

    def _read_envelope(self, message: dict[str, Any], request: InferRequest) -> None:
        refuse_unknown(_REQUEST, message, _MEMBERS)
        for name in _STRINGS:
            value = message.get(name)
            if value is not None and type(value) is not str:
                raise InvalidRequest(f"{name} must be a string, found {show(value)}")
        request.id = message.get("id")
        parameters = read_parameters(
            _REQUEST, message.get("parameters"), self._max_depth - _LEVELS_OF_PARAMETERS
        )
        binary = False
        if parameters:
            request.parameters = parameters
            request.priority = read_integer(_REQUEST, parameters, "priority")
            request.timeout_us = read_integer(_REQUEST, parameters, "timeout")
            binary = read_bool(_REQUEST, parameters, "binary_data_output", False)
        request.outputs = self._selector.select(message.get("outputs"), binary)

    def _decode_raw(self, body: memoryview) -> InferRequest:
        if len(self._readers) != 1:
            raise InvalidRequest(
                f"a raw body (Inference-Header-Content-Length 0) is one input, the model takes "
                f"{len(self._readers)}: {self._names}"
            )
        reader = self._readers[0]
        extent = reader.check_shape(reader.infer_shape(len(body)))
        raw = body if reader.datatype != "BYTES" else memoryview(pack_bytes([bytes(body)]))
        reader.check_binary(raw, extent)
        request = self._request([raw], (extent.shape,))
        request.outputs = self._selector.all_binary
        return request


def _most_elements(spec: TensorSpec, limits: Limits) -> int:
    if spec.datatype == "BYTES":
        return min(limits.max_elements, limits.max_strings)
    return limits.max_elements


def _parse(text: bytes | bytearray) -> dict[str, Any]:
    try:
        # The parser itself stops at 1024 levels; what is nested at all is checked where it is read.
        message = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not text:
            raise InvalidRequest("the request has no body, expected JSON") from None
        raise InvalidRequest(f"the request is not valid JSON: {error}") from None
    if type(message) is not dict:
        raise InvalidRequest(f"the request must be a JSON object, found {show(message)}")
    return message
