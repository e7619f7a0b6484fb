"""Tensor data between its JSON, binary and raw forms, each element checked.

The raw form is what models and frames take: contiguous, row-major, little-endian; for BYTES a u32
length and the bytes of each element. It equals the protocol's binary form, so binary data is
checked and passed on as a view. JSON data is packed by `struct`: its little-endian formats refuse
what is not a number, an integer out of range, and a double that overflows FP32. They take `true`
for 1; that has its own check.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import chain
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from serving.core.types import DATATYPES, TensorSpec
from serving.errors import InvalidRequest, ModelFailed

U32: Final = struct.Struct("<I")
NO_JSON_FORM: Final = frozenset({"FP16", "BF16"})

_INTEGER_FORMATS: Final = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
}
_FORMATS: Final = {**_INTEGER_FORMATS, "FP32": "f", "FP64": "d"}
# Shapes that were found to fit are kept; past this many all are dropped.
_CACHE_SIZE: Final = 256
_SHOWN_CHARS: Final = 40
_SHOWN_ITEMS: Final = 8


def show(value: object) -> str:
    """A JSON value as an error message names it: short whatever a client sends."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > _SHOWN_CHARS:
        value = value[:_SHOWN_CHARS] + "…"
    return orjson.dumps(value).decode()


def show_shape(shape: Sequence[object]) -> str:
    """A shape as an error message names it."""
    more = ", …" if len(shape) > _SHOWN_ITEMS else ""
    return f"[{', '.join(map(show, shape[:_SHOWN_ITEMS]))}{more}]"


def _allowed_values(datatype: str) -> str:
    if datatype in _INTEGER_FORMATS:
        info = np.iinfo(_INTEGER_FORMATS[datatype])
        return f"integers from {info.min} to {info.max}"
    if datatype == "FP32":
        return f"numbers from -{np.finfo(np.float32).max} to {np.finfo(np.float32).max}"
    return {"BOOL": "true and false", "BYTES": "strings"}.get(datatype, "numbers")


class Extent(NamedTuple):
    """A shape that fits an input, and what it determines.

    `pack` makes the raw form of that many JSON numbers, None for a datatype that is not of them.
    """

    shape: tuple[int, ...]
    elements: int
    pack: Callable[..., bytes] | None


class TensorReader:
    """Checks and packs one input of a signature. Every method raises `InvalidRequest` alone.

    `max_rows` is the most rows a request may have, 0 where the model has no batch dimension;
    `max_nesting` the most levels of lists in its JSON data.
    """

    __slots__ = (
        "_dims",
        "_expected",
        "_extents",
        "_format",
        "_itemsize",
        "_max_elements",
        "_max_nesting",
        "_max_rows",
        "datatype",
        "index",
        "name",
        "where",
    )

    def __init__(
        self, index: int, spec: TensorSpec, max_rows: int, max_elements: int, max_nesting: int
    ) -> None:
        self.index = index
        self.name = spec.name
        self.datatype = spec.datatype
        self.where = f"input {spec.name!r}"
        self._dims = spec.shape
        self._itemsize = DATATYPES[spec.datatype].itemsize
        self._max_rows = max_rows
        self._max_elements = max_elements
        self._max_nesting = max_nesting
        self._format = _FORMATS.get(spec.datatype)
        self._extents: dict[tuple[int, ...], Extent] = {}
        dims = ["any" if d < 0 else str(d) for d in spec.shape]
        if max_rows:
            dims[0] = f"1..{max_rows}"
        self._expected = f"[{', '.join(dims)}]"

    def json_volume(self) -> tuple[int, int]:
        """The most elements, and the most lists around them, that a request's data may have."""
        dims = (self._max_rows, *self._dims[1:]) if self._max_rows else self._dims
        if min(dims, default=0) < 0:
            return self._max_elements, self._max_elements
        return prod(dims), sum(prod(dims[:level]) for level in range(len(dims)))

    def check_shape(self, shape: Any) -> Extent:
        """The extent of a tensor of this shape (parsed JSON, of any type)."""
        if type(shape) is not list or len(shape) != len(self._dims):
            raise self._wrong_shape(shape)
        for dim in shape:
            # `true` and 1.0 equal 1, and so would find its extent.
            if type(dim) is not int:
                raise self._wrong_shape(shape)
        key = tuple(shape)
        return self._extents.get(key) or self._new_extent(key)

    def _new_extent(self, shape: tuple[int, ...]) -> Extent:
        if not all(
            dim == expected if expected >= 0 else dim >= 0
            for dim, expected in zip(shape, self._dims, strict=True)
        ):
            raise self._wrong_shape(list(shape))
        if self._max_rows and not 0 < shape[0] <= self._max_rows:
            raise InvalidRequest(
                f"{self.where} has {shape[0]} rows; a request may have 1 to {self._max_rows}"
            )
        # Zeros do not count: an empty tensor may not hide dimensions that no array library can
        # represent.
        if prod(dim or 1 for dim in shape) > self._max_elements:
            raise InvalidRequest(
                f"{self.where} has shape {show_shape(shape)}; "
                f"at most {self._max_elements} elements are allowed"
            )
        elements = prod(shape)
        pack = struct.Struct(f"<{elements}{self._format}").pack if self._format else None
        extent = Extent(shape, elements, pack)
        if len(self._extents) >= _CACHE_SIZE:
            self._extents.clear()
        self._extents[shape] = extent
        return extent

    def _wrong_shape(self, shape: Any) -> InvalidRequest:
        found = show_shape(shape) if isinstance(shape, list) else show(shape)
        return InvalidRequest(f"{self.where} has shape {found}, expected {self._expected}")

    def infer_shape(self, nbytes: int) -> list[int]:
        """The shape of a raw body of `nbytes`: one row, and at most one more variable dimension.

        A BYTES body is one element, whatever its length.
        """
        dims = [1, *self._dims[1:]] if self._max_rows else list(self._dims)
        variable = [i for i, dim in enumerate(dims) if dim < 0]
        if len(variable) > 1:
            raise InvalidRequest(
                f"{self.where} has {len(variable)} variable dimensions, so a raw body does not "
                "tell its shape; send it with a JSON header"
            )
        if variable:
            known = prod(dim for dim in dims if dim >= 0) * self._itemsize
            dims[variable[0]] = nbytes // known if known else 1
        return dims

    def pack_json(self, data: Any, extent: Extent, may_hold_bools: bool) -> bytes:
        """The raw form of JSON data, flat or nested as its shape says.

        `may_hold_bools` False promises that no element is a JSON bool, which saves looking at each.
        """
        if type(data) is not list:
            raise InvalidRequest(f"{self.where}: data must be a list, found {show(data)}")
        if data and type(data[0]) is list:
            data = self._flatten(data, extent.shape)
        if len(data) != extent.elements:
            raise InvalidRequest(
                f"{self.where} has {len(data)} elements of data, "
                f"its shape {show_shape(extent.shape)} needs {extent.elements}"
            )
        if extent.pack is None:
            return self._pack_other(data)
        if may_hold_bools and bool in set(map(type, data)):
            raise self._wrong_element(data)
        try:
            return extent.pack(*data)
        except (struct.error, OverflowError):
            raise self._wrong_element(data) from None

    def _flatten(self, data: list[Any], shape: tuple[int, ...]) -> list[Any]:
        if len(shape) > self._max_nesting:
            raise InvalidRequest(
                f"{self.where}: data may be nested {self._max_nesting} deep, its shape has "
                f"{len(shape)} dimensions; send it flat"
            )
        if len(shape) < 2 or len(data) != shape[0]:
            raise self._wrong_nesting(shape)
        for dim in shape[1:]:
            # Lists alone have their length taken: a string has one too.
            if set(map(type, data)) - {list} or set(map(len, data)) - {dim}:
                raise self._wrong_nesting(shape)
            data = data[0] if len(data) == 1 else list(chain.from_iterable(data))
        return data

    def _wrong_nesting(self, shape: tuple[int, ...]) -> InvalidRequest:
        return InvalidRequest(
            f"{self.where}: the nesting of its data does not agree with its shape "
            f"{show_shape(shape)}; nest it exactly so, or send it flat"
        )

    def _pack_other(self, data: list[Any]) -> bytes:
        if self.datatype in NO_JSON_FORM:
            raise InvalidRequest(
                f"{self.where} has datatype {self.datatype}, which has no JSON form; "
                "send it as binary data"
            )
        python = bool if self.datatype == "BOOL" else str
        if set(map(type, data)) - {python}:
            raise self._wrong_element(data)
        return bytes(data) if python is bool else pack_bytes([text.encode() for text in data])

    def _wrong_element(self, data: list[Any]) -> InvalidRequest:
        # Halving costs as much as packing once; trying each alone would cost a long list dear.
        low, high = 0, len(data)
        while high - low > 1:
            middle = (low + high) // 2
            if self._takes(data[low:middle]):
                low = middle
            else:
                high = middle
        return InvalidRequest(
            f"{self.where}: element {low} is {show(data[low])}; "
            f"{self.datatype} takes {_allowed_values(self.datatype)}"
        )

    def _takes(self, values: list[Any]) -> bool:
        types = set(map(type, values))
        if self._format is None:
            return types == {bool if self.datatype == "BOOL" else str}
        try:
            struct.pack(f"<{len(values)}{self._format}", *values)
        except (struct.error, OverflowError):
            return False
        return bool not in types

    def check_binary(self, raw: memoryview, extent: Extent) -> None:
        """Check that `raw` is the binary form of a tensor of this extent."""
        if self._itemsize == 0:
            self._check_bytes(raw, extent)
        elif len(raw) != extent.elements * self._itemsize:
            raise InvalidRequest(
                f"{self.where} has {len(raw)} bytes of binary data, its shape "
                f"{show_shape(extent.shape)} of {self.datatype} needs "
                f"{extent.elements * self._itemsize}"
            )
        elif self.datatype == "BOOL" and extent.elements:
            highest = int(np.frombuffer(raw, np.uint8).max())
            if highest > 1:
                raise InvalidRequest(f"{self.where} has a byte {highest}; BOOL takes 0 and 1")

    def _check_bytes(self, raw: memoryview, extent: Extent) -> None:
        at, end = 0, len(raw)
        for index in range(extent.elements):
            if at + U32.size > end:
                raise InvalidRequest(
                    f"{self.where}: its binary data ends after {index} elements, "
                    f"its shape {show_shape(extent.shape)} needs {extent.elements}"
                )
            (length,) = U32.unpack_from(raw, at)
            at += U32.size + length
            if at > end:
                raise InvalidRequest(
                    f"{self.where}: element {index} says {length} bytes, "
                    f"{end - at + length} are left in its binary data"
                )
        if at != end:
            raise InvalidRequest(
                f"{self.where}: {end - at} bytes of binary data are left over after the "
                f"{extent.elements} elements of its shape {show_shape(extent.shape)}"
            )


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """The raw form of a BYTES tensor."""
    pack = U32.pack
    return b"".join([part for e in elements for part in (pack(len(e)), e)])


def unpack_bytes(name: str, raw: memoryview | bytes, count: int) -> list[bytes]:
    """The `count` elements of a BYTES output. Raises `ModelFailed` if it does not hold so many."""
    elements, at, end = [], 0, len(raw)
    view = memoryview(raw)
    while at + U32.size <= end:
        (length,) = U32.unpack_from(view, at)
        at += U32.size
        elements.append(bytes(view[at : at + length]))
        at += length
    if at != end or len(elements) != count:
        raise ModelFailed(
            f"output {name!r}: its raw form does not hold the {count} elements of its shape"
        )
    return elements


def dump_json(name: str, datatype: str, raw: memoryview | bytes, count: int) -> bytes:
    """The flat JSON array of an output's raw form.

    Raises `InvalidRequest` where JSON cannot carry a value (NaN, infinity, bytes that are not
    UTF-8): the client asked for a form that the answer does not have. The raw form's size must
    already be checked.
    """
    if datatype == "BYTES":
        try:
            return orjson.dumps([element.decode() for element in unpack_bytes(name, raw, count)])
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output {name!r} holds bytes that are not UTF-8, which JSON cannot carry; "
                "request it with binary_data"
            ) from None
    if count == 0:
        return b"[]"
    text = orjson.dumps(
        np.frombuffer(raw, DATATYPES[datatype].numpy), option=orjson.OPT_SERIALIZE_NUMPY
    )
    # NaN and infinity come out as null, and nothing else in an array of numbers and bools has an
    # "n".
    if b"n" in text:
        raise InvalidRequest(
            f"output {name!r} holds NaN or infinity, which JSON cannot carry; "
            "request it with binary_data"
        )
    return text
