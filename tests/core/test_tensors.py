"""Values as messages show them, and the raw form of BYTES."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.tensors import TensorReader, dump_json, pack_bytes, show, show_shape, unpack_bytes
from serving.core.types import DATATYPES, TensorSpec
from serving.errors import InvalidRequest, ModelFailed
from tests.core.protocol_cases import elements


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (-1, "-1"),
        (2**64 - 1, "18446744073709551615"),
        (0.1, "0.1"),
        ('a"b\n', r'"a\"b\n"'),
        ("x" * 41, '"' + "x" * 40 + '…"'),
        ([1, [2]], "a list of 2"),
        ({"a": 1}, "an object"),
    ],
)
def test_a_shown_value_is_its_json_kept_short(value, text):
    assert show(value) == text


def test_a_shown_shape_is_kept_short():
    assert show_shape([1, "2", [3]]) == '[1, "2", a list of 1]'
    assert show_shape(list(range(9))) == "[0, 1, 2, 3, 4, 5, 6, 7, …]"


@given(st.lists(st.binary(max_size=9)))
def test_bytes_round_trip(parts):
    raw = pack_bytes(parts)
    assert elements(raw) == parts
    assert unpack_bytes("o", memoryview(raw), len(parts)) == parts


@given(st.lists(st.binary(max_size=5), min_size=1), st.data())
def test_bytes_that_do_not_add_up(parts, data):
    raw = pack_bytes(parts)
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    with pytest.raises(ModelFailed, match="output 'o': its raw form does not hold"):
        unpack_bytes("o", cut, len(parts))


@pytest.mark.parametrize("offset", range(8))
def test_numbers_are_read_at_any_alignment(offset):
    raw = memoryview(b"!" * offset + np.array([1.5, -2], "<f8").tobytes())[offset:]
    assert dump_json("o", "FP64", raw, 2) == b"[1.5,-2.0]"


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_may_hold_bools_changes_the_speed_and_not_the_result(datatype):
    reader = TensorReader(0, TensorSpec("x", datatype, (-1,)), 8, 100, 29)
    data = {"BOOL": [True, False], "BYTES": ["a", "b"]}.get(datatype, [1, 0])
    extent = reader.check_shape([2])
    results = []
    for may_hold_bools in (True, False):
        try:
            results.append(reader.pack_json(data, extent, may_hold_bools))
        except InvalidRequest as error:
            results.append(str(error).encode())
    assert results[0] == results[1]
