"""Encodes inference responses of the Open Inference Protocol v2 over REST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
import orjson

from serving.core.classification import classify
from serving.core.inference import EncodedResponse, InferRequest, OutputTensor, RequestedOutput
from serving.core.tensors import NO_JSON_FORM, dump_json, pack_bytes, show_shape
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec
from serving.errors import ModelFailed

# Encoded shapes are kept; past this many all are dropped.
_CACHE_SIZE: Final = 256
_DATA: Final = b',"data":'
_BINARY: Final = b',"parameters":{"binary_data_size":%d}'


@dataclass(frozen=True, slots=True)
class _Form:
    """What is the same in every response with one output of one shape.

    `nbytes` is the raw form's length, -1 for BYTES. `head` is the output's JSON up to its data,
    `json_head` up to the array of its data, `rows_head` up to the first value in it.
    """

    count: int
    nbytes: int
    head: bytes
    json_head: bytes
    rows_head: bytes


def _describe(name: str, datatype: str, shape: Sequence[int]) -> bytes:
    """A response tensor's JSON object, still open."""
    return orjson.dumps({"name": name, "shape": shape, "datatype": datatype})[:-1]


class _Writer:
    """Encodes one output of a signature."""

    __slots__ = ("_forms", "_itemsize", "datatype", "index", "name", "shape")

    def __init__(self, index: int, spec: TensorSpec) -> None:
        self.index = index
        self.name = spec.name
        self.datatype = spec.datatype
        self.shape = spec.shape
        self._itemsize = DATATYPES[spec.datatype].itemsize
        self._forms: dict[tuple[int, ...], _Form] = {}

    def form(self, output: OutputTensor, rows: int) -> _Form:
        """The form of an output that fits the signature. Raises `ModelFailed` if it does not.

        `rows` is how many the request has, 0 for a model without batch dimension.
        """
        form = self._forms.get(output.shape) or self._new_form(output.shape)
        if form.nbytes != len(output.data) and form.nbytes >= 0:
            raise ModelFailed(
                f"output {self.name!r} has {len(output.data)} bytes, its shape "
                f"{show_shape(output.shape)} of {self.datatype} needs {form.nbytes}"
            )
        if rows and output.shape[0] != rows:
            raise ModelFailed(
                f"output {self.name!r} has {output.shape[0]} rows for a request of {rows}"
            )
        return form

    def dump_rows(self, shape: tuple[int, ...], data: memoryview) -> list[bytes] | None:
        """The JSON values of each row of a batch, flat and without brackets.

        None if shape or data do not fit the signature, or have no such form.
        """
        if self.datatype in NO_JSON_FORM or not self._itemsize or not data:
            return None
        # The first dimension is the batch's, whatever the signature says of a request's.
        if not self._fits((self.shape[0], *shape[1:])):
            return None
        if len(data) != prod(shape) * self._itemsize:
            return None
        values = np.frombuffer(data, DATATYPES[self.datatype].numpy).reshape(shape[0], -1)
        text = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)
        # NaN and infinity come out as null, and nothing else here has an "n".
        if b"n" in text:
            return None
        return text[2:-2].split(b"],[")

    def row_head(self, rows: int, tail: tuple[int, ...]) -> bytes:
        """The output's JSON up to the first value, for a request of so many rows."""
        form = self._forms.get((rows, *tail)) or self._new_form((rows, *tail))
        return form.rows_head

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            dim == expected or expected < 0 for dim, expected in zip(shape, self.shape, strict=True)
        )

    def _new_form(self, shape: tuple[int, ...]) -> _Form:
        if not self._fits(shape):
            raise ModelFailed(
                f"output {self.name!r} has shape {show_shape(shape)}, "
                f"the model's signature says {show_shape(self.shape)}"
            )
        count = prod(shape)
        if len(self._forms) >= _CACHE_SIZE:
            self._forms.clear()
        nbytes = count * self._itemsize if self._itemsize else -1
        head = _describe(self.name, self.datatype, shape)
        form = _Form(count, nbytes, head, head + _DATA, head + _DATA + b"[")
        self._forms[shape] = form
        return form


class ResponseEncoder:
    """Encodes the responses of one model version. Everything that can be is encoded beforehand."""

    def __init__(self, model: str, version: str, signature: Signature) -> None:
        self._writers = tuple(_Writer(i, spec) for i, spec in enumerate(signature.outputs))
        self._batched = signature.batch is not Batch.NONE
        self._envelope = orjson.dumps({"model_name": model, "model_version": version})[:-1]
        self._head = self._envelope + b',"outputs":['

    def encode(self, request: InferRequest, outputs: Sequence[OutputTensor]) -> EncodedResponse:
        """The response to `request`. `outputs` holds at least those asked for, in any order.

        Raises `ModelFailed` where an output is missing or does not fit the signature,
        `InvalidRequest` where it has no such form as was asked for (NaN in JSON).
        """
        by_index = {output.index: output for output in outputs}
        parts = [self._head if request.id is None else self._head_with(request.id)]
        rows = request.rows if self._batched else 0
        if request.outputs is not None:
            return self._encode_requested(request.outputs, rows, by_index, parts)
        for writer in self._writers:
            output = by_index.get(writer.index) or self._missing(writer.index)
            form = writer.form(output, rows)
            parts.append(form.json_head)
            parts.append(dump_json(writer.name, writer.datatype, output.data, form.count))
            parts.append(b"},")
        parts[-1] = b"}]}"
        return EncodedResponse(b"".join(parts))

    def encode_batch(
        self,
        requests: Sequence[InferRequest],
        shapes: Sequence[tuple[int, ...]],
        tensors: Sequence[memoryview],
    ) -> list[bytes] | None:
        """The response bodies to requests that ran as one batch and want all outputs as JSON.

        `shapes` and `tensors` are the outputs of the whole batch, in the signature's order. All
        rows of an output become JSON in one go, which are then handed out: for small rows several
        times faster than a response at a time. None where that does not work out (an output with a
        form of its own for each request, one that JSON cannot carry or that does not fit the
        signature): then `encode` each, for its answer or its error.
        """
        rows = sum([request.rows for request in requests])
        if not self._batched or len(shapes) != len(self._writers):
            return None
        if any(request.outputs is not None for request in requests):
            return None
        columns = []
        for writer, shape, tensor in zip(self._writers, shapes, tensors, strict=True):
            if not shape or shape[0] != rows:
                return None
            column = writer.dump_rows(shape, tensor)
            if column is None:
                return None
            columns.append((writer, shape[1:], column))
        bodies = []
        at = 0
        for request in requests:
            end = at + request.rows
            parts = [self._head if request.id is None else self._head_with(request.id)]
            for writer, tail, column in columns:
                parts.append(writer.row_head(request.rows, tail))
                parts.append(column[at] if end - at == 1 else b",".join(column[at:end]))
                parts.append(b"]},")
            parts[-1] = b"]}]}"
            bodies.append(b"".join(parts))
            at = end
        return bodies

    def _head_with(self, request_id: str) -> bytes:
        return b'%b,"id":%b,"outputs":[' % (self._envelope, orjson.dumps(request_id))

    def _missing(self, index: int) -> OutputTensor:
        raise ModelFailed(f"the model returned no output {self._writers[index].name!r}")

    def _encode_requested(
        self,
        requested: Sequence[RequestedOutput],
        rows: int,
        by_index: Mapping[int, OutputTensor],
        parts: list[bytes],
    ) -> EncodedResponse:
        buffers: list[bytes | memoryview] = []
        for spec in requested:
            output = by_index.get(spec.index) or self._missing(spec.index)
            writer = self._writers[spec.index]
            form = writer.form(output, rows)
            name, datatype, data, count = writer.name, writer.datatype, output.data, form.count
            head = form.head
            if spec.classification:
                elements, k = classify(name, datatype, data, rows or 1, spec.classification)
                datatype, data, count = "BYTES", pack_bytes(elements), len(elements)
                head = _describe(name, datatype, (rows, k) if rows else (k,))
            if spec.binary:
                parts += (head, _BINARY % len(data))
                buffers.append(data)
            else:
                parts += (head, _DATA, dump_json(name, datatype, data, count))
            parts.append(b"},")
        parts[-1] = b"}]}"
        text = b"".join(parts)
        if not any(spec.binary for spec in requested):
            return EncodedResponse(text)
        return EncodedResponse([text, *buffers], len(text))
