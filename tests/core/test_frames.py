"""Frames: what is written is read, and what is not a frame is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.frames import (
    MAX_META_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    PROTOCOL_VERSION,
    FrameError,
    Kind,
    TensorEntry,
    decode_json,
    decode_prefix,
    decode_table,
    encode_json,
    encode_prefix,
    encode_table,
    padding,
    payload_spans,
)
from serving.core.types import DATATYPES

entries = st.builds(
    TensorEntry,
    index=st.integers(0, 2**16 - 1),
    datatype=st.sampled_from(sorted(DATATYPES)),
    shape=st.lists(st.integers(0, 2**62), max_size=8).map(tuple),
    nbytes=st.integers(0, 2**20),
)


@given(
    st.sampled_from(Kind),
    st.integers(0, 2**16 - 1),
    st.integers(0, MAX_META_BYTES),
    st.integers(0, MAX_PAYLOAD_BYTES),
)
def test_prefix_round_trip(kind, tensors, meta, payload):
    raw = encode_prefix(kind, tensors, meta, payload)
    assert len(raw) == 16
    assert decode_prefix(memoryview(raw)) == (kind, tensors, meta, payload)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((Kind.INFER, PROTOCOL_VERSION + 1, 0, 0, 0), "protocol version 2, expected 1"),
        ((0, PROTOCOL_VERSION, 0, 0, 0), "unknown frame kind 0"),
        ((99, PROTOCOL_VERSION, 0, 0, 0), "unknown frame kind 99"),
        ((Kind.INFER, PROTOCOL_VERSION, 0, MAX_META_BYTES + 1, 0), "frame too large"),
        ((Kind.INFER, PROTOCOL_VERSION, 0, 0, MAX_PAYLOAD_BYTES + 1), "frame too large"),
    ],
)
def test_prefixes_that_are_refused(fields, says):
    with pytest.raises(FrameError, match=says):
        decode_prefix(PREFIX.pack(*fields))


@given(st.binary(min_size=16, max_size=16))
def test_any_sixteen_bytes_are_a_prefix_or_a_frame_error(raw):
    try:
        kind, _, meta, payload = decode_prefix(raw)
    except FrameError:
        return
    assert kind in Kind
    assert meta <= MAX_META_BYTES
    assert payload <= MAX_PAYLOAD_BYTES


@given(st.lists(entries, max_size=5), st.binary(max_size=9))
def test_table_round_trip(table, before):
    assert decode_table(before + encode_table(table), len(before), len(table)) == table


@given(st.lists(entries, min_size=1, max_size=3), st.data())
def test_a_truncated_table_is_a_frame_error(table, data):
    raw = encode_table(table)
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(FrameError, match="malformed tensor table"):
        decode_table(raw[:cut], 0, len(table))


def test_an_unknown_datatype_is_a_frame_error():
    raw = bytearray(encode_table([TensorEntry(0, "BOOL", (1,), 1)]))
    raw[2] = 200
    with pytest.raises(FrameError, match="malformed tensor table"):
        decode_table(raw, 0, 1)


@given(st.lists(entries, max_size=5))
def test_spans_cover_the_padded_payload(table):
    payload = sum(e.nbytes + len(padding(e.nbytes)) for e in table)
    spans = payload_spans(table, payload)
    assert [end - start for start, end in spans] == [e.nbytes for e in table]
    assert all(start % 8 == 0 for start, _ in spans)
    with pytest.raises(FrameError, match="its tensor table says"):
        payload_spans(table, payload + 8)


def test_json_frames():
    body = {"role": "data", "é": [1, None]}
    frame = encode_json(Kind.FAILED, body, head=b"12345678")
    kind, tensors, meta, payload = decode_prefix(frame)
    assert (kind, tensors, payload) == (Kind.FAILED, 0, 0)
    assert len(frame) == 16 + meta
    assert decode_json(frame[16:], 8) == body


@pytest.mark.parametrize("meta", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_what_is_not_a_json_object_is_a_frame_error(meta):
    with pytest.raises(FrameError):
        decode_json(meta)
