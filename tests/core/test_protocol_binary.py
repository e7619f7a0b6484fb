"""Binary tensor data in requests: framing after the JSON, and raw bodies."""

from __future__ import annotations

import numpy as np
import pytest

from serving.core.protocol import InferCodec
from serving.core.tensors import pack_bytes
from serving.core.types import Batch
from serving.errors import InvalidRequest
from tests.core.protocol_cases import (
    LIMITS,
    MAX_ROWS,
    assert_fits,
    binary,
    body,
    codec,
    signature,
    tensor,
)

X = ("x", "FP32", (-1, 4))
ROW = np.array([1, np.nan, np.inf, -0.0], "<f4").tobytes()


def refusal(taken: InferCodec, raw: bytes, json_length: int | None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        taken.decode(raw, json_length)
    return str(caught.value)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_tensor_bytes_are_not_copied(form):
    raw, length = binary(("x", "FP32", [1, 4], ROW))
    held = form(raw)
    request = codec([X]).decode(held, length)
    (view,) = request.inputs
    assert isinstance(view, memoryview)
    assert view.tobytes() == ROW
    # The view's memory is the body's, at the offset where the JSON ends.
    at = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    start = np.frombuffer(held, np.uint8).__array_interface__["data"][0]
    assert at == start + length


def test_binary_and_json_inputs_mix_in_any_order():
    taken = codec([("a", "INT32", (-1, 1)), ("b", "UINT8", (-1, 3)), ("c", "BOOL", (-1, 1))])
    head = body(
        tensor("c", "BOOL", [1, 1], parameters={"binary_data_size": 1}),
        tensor("a", "INT32", [1, 1], [-5]),
        tensor("b", "UINT8", [1, 3], parameters={"binary_data_size": 3, "content_type": "np"}),
    )
    request = taken.decode(head + b"\x01" + b"abc", len(head))
    assert [bytes(i) for i in request.inputs] == [b"\xfb\xff\xff\xff", b"abc", b"\x01"]


@pytest.mark.parametrize("missing", [1, 15, 16])
def test_truncated_tail(missing):
    raw, length = binary(("x", "FP32", [1, 4], ROW))
    says = refusal(codec([X]), raw[:-missing], None if missing == 16 else length)
    assert f"input 'x' has binary_data_size 16, {16 - missing} bytes are left for it" in says


def test_leftover_bytes():
    raw, length = binary(("x", "FP32", [1, 4], ROW), tail=b"!!")
    assert "2 bytes left over after its last binary input" in refusal(codec([X]), raw, length)
    plain = body(tensor("x", "FP32", [1, 4], [1] * 4))
    says = refusal(codec([X]), plain + b"!", len(plain))
    assert "1 bytes left over" in says


@pytest.mark.parametrize("size", [0, 12, 17, 20])
def test_size_must_agree_with_shape_and_datatype(size):
    raw, length = binary(("x", "FP32", [1, 4], bytes(size)))
    says = refusal(codec([X]), raw, length)
    assert f"has {size} bytes of binary data, its shape [1, 4] of FP32 needs 16" in says


@pytest.mark.parametrize("size", [-1, 1.0, "16", True, [], {}, 2**64])
def test_size_must_be_a_number_of_bytes(size):
    head = body(tensor("x", "FP32", [1, 4], parameters={"binary_data_size": size}))
    says = refusal(codec([X]), head + ROW, len(head))
    assert "binary_data_size" in says
    assert "takes a number of bytes from 0" in says


def test_a_size_past_the_body():
    head = body(tensor("x", "FP32", [1, 4], parameters={"binary_data_size": 2**63}))
    says = refusal(codec([X]), head + ROW, len(head))
    assert f"binary_data_size {2**63}, 16 bytes are left" in says


@pytest.mark.parametrize("offset", [1, 1000])
def test_json_longer_than_the_body(offset):
    raw, _ = binary(("x", "FP32", [1, 4], ROW))
    says = refusal(codec([X]), raw, len(raw) + offset)
    assert f"is {len(raw) + offset}, the body has {len(raw)} bytes" in says


@pytest.mark.parametrize("by", [-1, 1, 8])
def test_a_wrong_json_length(by):
    raw, length = binary(("x", "FP32", [1, 4], ROW))
    assert "not valid JSON" in refusal(codec([X]), raw, length + by)


def test_bool_bytes_are_zero_and_one():
    taken = codec([("x", "BOOL", (-1, 3))])
    raw, length = binary(("x", "BOOL", [1, 3], b"\x00\x01\x00"))
    assert bytes(taken.decode(raw, length).inputs[0]) == b"\x00\x01\x00"
    raw, length = binary(("x", "BOOL", [1, 3], b"\x00\x02\x00"))
    assert "has a byte 2; BOOL takes 0 and 1" in refusal(taken, raw, length)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "ends after 0 elements, its shape [1, 2] needs 2"),
        (b"\x01\x00\x00\x00a", "ends after 1 elements"),
        (b"\x01\x00\x00\x00a\x00\x00", "ends after 1 elements"),
        (b"\x01\x00\x00\x00a\x05\x00\x00\x00abc", "element 1 says 5 bytes, 3 are left"),
        (b"\x01\x00\x00\x00a\x05\x00\x00\x00abcd", "element 1 says 5 bytes, 4 are left"),
        (b"\xff\xff\xff\xffa", f"element 0 says {2**32 - 1} bytes, 1 are left"),
        (pack_bytes([b"a", b"b", b"c"]), "5 bytes of binary data are left over after the 2"),
    ],
)
def test_bytes_framing(data, says):
    raw, length = binary(("x", "BYTES", [1, 2], data))
    assert says in refusal(codec([("x", "BYTES", (-1, 2))]), raw, length)


def test_bytes_hold_anything():
    data = pack_bytes([b"", b"\xff\x00\xfe"])
    raw, length = binary(("x", "BYTES", [1, 2], data))
    assert bytes(codec([("x", "BYTES", (-1, 2))]).decode(raw, length).inputs[0]) == data


def test_raw_body():
    request = codec([X]).decode(ROW, 0)
    assert_fits(request, signature([X]))
    assert (request.rows, bytes(request.inputs[0])) == (1, ROW)
    assert [(o.index, o.binary) for o in request.outputs or ()] == [(0, True)]


@pytest.mark.parametrize(
    ("dims", "batch", "nbytes", "shape"),
    [
        ((-1, 4), Batch.DYNAMIC, 16, (1, 4)),
        ((-1, -1, 2), Batch.DYNAMIC, 24, (1, 3, 2)),
        ((-1, -1), Batch.DYNAMIC, 0, (1, 0)),
        ((-1, 2), Batch.NONE, 16, (2, 2)),
        ((), Batch.NONE, 4, ()),
    ],
)
def test_raw_body_shapes(dims, batch, nbytes, shape):
    request = codec([("x", "FP32", dims)], batch=batch).decode(bytes(nbytes), 0)
    assert request.shapes == (shape,)


@pytest.mark.parametrize(
    ("dims", "batch", "nbytes", "says"),
    [
        (
            (-1, 4),
            Batch.DYNAMIC,
            0,
            "has 0 bytes of binary data, its shape [1, 4] of FP32 needs 16",
        ),
        ((-1, 4), Batch.DYNAMIC, 32, "needs 16"),
        ((-1, -1, 2), Batch.DYNAMIC, 20, "its shape [1, 2, 2] of FP32 needs 16"),
        ((-1, -1), Batch.NONE, 16, "has 2 variable dimensions"),
        ((-1, -1), Batch.DYNAMIC, 8 << 20, f"at most {1 << 20} elements are allowed"),
        ((-1, 0), Batch.NONE, 4, "its shape [1, 0] of FP32 needs 0"),
    ],
)
def test_raw_bodies_that_do_not_tell_a_shape(dims, batch, nbytes, says):
    assert says in refusal(codec([("x", "FP32", dims)], batch=batch), bytes(nbytes), 0)


def test_raw_body_of_bytes_is_one_element():
    for dims in ((-1, 1), (-1, -1), (-1,)):
        request = codec([("x", "BYTES", dims)]).decode(b"as it is", 0)
        assert bytes(request.inputs[0]) == pack_bytes([b"as it is"])
        assert set(request.shapes[0]) == {1}
    says = refusal(codec([("x", "BYTES", (-1, 2))]), b"as it is", 0)
    assert "ends after 1 elements" in says


def test_raw_body_of_a_model_with_two_inputs():
    says = refusal(codec([X, ("y", "FP32", (-1, 1))]), ROW, 0)
    assert "a raw body (Inference-Header-Content-Length 0) is one input, the model takes 2" in says


def test_rows_are_bounded_in_binary_too():
    rows = MAX_ROWS + 1
    raw, length = binary(("x", "FP32", [rows, 4], bytes(16 * rows)))
    assert f"has {rows} rows; a request may have 1 to {MAX_ROWS}" in refusal(
        codec([X]), raw, length
    )


def test_strings_are_fewer_than_numbers_may_be():
    """Each is looked at by itself: millions would hold everyone up."""
    most = LIMITS.max_strings
    taken = codec([("x", "BYTES", (-1, -1))])
    raw, length = binary(("x", "BYTES", [1, most], bytes(4 * most)))
    assert taken.decode(raw, length).shapes == ((1, most),)
    raw, length = binary(("x", "BYTES", [1, most + 1], bytes(4 * most + 4)))
    assert f"at most {most} elements are allowed" in refusal(taken, raw, length)
