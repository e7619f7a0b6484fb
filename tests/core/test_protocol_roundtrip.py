"""Every datatype there and back, as an input and as an output: JSON flat, nested, binary."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.inference import OutputTensor
from serving.core.tensors import NO_JSON_FORM, pack_bytes
from serving.core.types import DATATYPES
from tests.core.protocol_cases import (
    MAX_ROWS,
    assert_fits,
    binary,
    body,
    codec,
    elements,
    signature,
    tensor,
)

JSON_TYPES = sorted(set(DATATYPES) - NO_JSON_FORM)
# Surrogates are no characters: no encoder sends them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def values(datatype: str) -> st.SearchStrategy[Any]:
    """JSON values of a datatype, its extremes among them."""
    if datatype == "BOOL":
        return st.booleans()
    if datatype == "BYTES":
        return TEXT
    numpy = DATATYPES[datatype].numpy
    assert numpy is not None
    if numpy.kind == "f":
        width = 8 * numpy.itemsize
        return st.floats(width=width, allow_nan=False, allow_infinity=False)
    info = np.iinfo(numpy)
    return st.integers(int(info.min), int(info.max)) | st.sampled_from([info.min, info.max]).map(
        int
    )


def nest(flat: list[Any], shape: tuple[int, ...]) -> Any:
    if len(shape) == 1:
        return flat
    step = prod(shape[1:])
    return [nest(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def raw_form(datatype: str, flat: list[Any]) -> bytes:
    if datatype == "BYTES":
        return pack_bytes([text.encode() for text in flat])
    return np.array(flat, DATATYPES[datatype].numpy).tobytes()


shapes = st.tuples(st.integers(1, MAX_ROWS), st.integers(0, 4), st.integers(1, 3))


@pytest.mark.parametrize("datatype", JSON_TYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=shapes, nested=st.booleans(), keyed=st.booleans())
def test_json(datatype, data, shape, nested, keyed):
    flat = data.draw(st.lists(values(datatype), min_size=prod(shape), max_size=prod(shape)))
    specs = [("x", datatype, (-1, -1, shape[2]))]
    taken = codec(specs, [("y", *specs[0][1:])])
    sent = nest(flat, shape) if nested else flat
    more = {"id": "r", "outputs": [{"name": "y"}]} if keyed else {}

    request = taken.decode(body(tensor("x", datatype, list(shape), sent), **more), None)
    assert bytes(request.inputs[0]) == raw_form(datatype, flat)

    response = taken.encode(request, [OutputTensor(0, shape, request.inputs[0])])
    (output,) = json.loads(response.body)["outputs"]
    assert (output["shape"], output["datatype"]) == (list(shape), datatype)
    # Text and integers come back as they went, FP32 as the shortest number that is the same FP32.
    assert raw_form(datatype, output["data"]) == raw_form(datatype, flat)
    assert [type(v) for v in output["data"]] == [type(v) for v in flat]


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
@settings(max_examples=30, deadline=None)
@given(data=st.data(), shape=shapes)
def test_binary(datatype, data, shape):
    itemsize, count = DATATYPES[datatype].itemsize, prod(shape)
    if datatype == "BYTES":
        parts = data.draw(st.lists(st.binary(max_size=6), min_size=count, max_size=count))
        raw = pack_bytes(parts)
        assert elements(raw) == parts
    elif datatype == "BOOL":
        raw = bytes(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    else:
        raw = data.draw(st.binary(min_size=count * itemsize, max_size=count * itemsize))
    taken = codec([("x", datatype, (-1, -1, shape[2]))], [("y", datatype, (-1, -1, shape[2]))])
    sent, length = binary(
        ("x", datatype, list(shape), raw), parameters={"binary_data_output": True}
    )

    request = taken.decode(sent, length)
    assert bytes(request.inputs[0]) == raw

    response = taken.encode(request, [OutputTensor(0, shape, request.inputs[0])])
    head, tail = response.body
    assert response.json_length == len(head)
    assert bytes(tail) == raw
    assert json.loads(head)["outputs"][0]["parameters"] == {"binary_data_size": len(raw)}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_many_inputs_in_any_order_and_form(data):
    rows = data.draw(st.integers(1, MAX_ROWS))
    datatypes = data.draw(st.lists(st.sampled_from(JSON_TYPES), min_size=1, max_size=4))
    specs = [(f"i{n}", datatype, (-1, 2)) for n, datatype in enumerate(datatypes)]
    taken = codec(specs)
    entries, raws = [], []
    for name, datatype, _ in specs:
        flat = data.draw(st.lists(values(datatype), min_size=2 * rows, max_size=2 * rows))
        raws.append(raw_form(datatype, flat))
        entries.append((tensor(name, datatype, [rows, 2]), flat, raws[-1]))
    tail, sent = b"", []
    for entry, flat, raw in data.draw(st.permutations(entries)):
        if data.draw(st.booleans()):
            sent.append({**entry, "data": flat})
        else:
            sent.append({**entry, "parameters": {"binary_data_size": len(raw)}})
            tail += raw
    head = body(*sent)
    request = taken.decode(head + tail, len(head))
    assert [bytes(i) for i in request.inputs] == raws
    assert request.rows == rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**64 - 1) | st.floats(-1e38, 1e38), min_size=1, max_size=9))
def test_integers_and_fractions_mix_in_floating_point_data(mixed):
    raw = body(tensor("x", "FP32", [1, len(mixed)], mixed))
    request = codec([("x", "FP32", (-1, -1))]).decode(raw, None)
    assert bytes(request.inputs[0]) == np.array([float(v) for v in mixed], "<f4").tobytes()
    assert_fits(request, signature([("x", "FP32", (-1, -1))]))
