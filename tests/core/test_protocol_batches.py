"""Responses to a batch, encoded at once: byte for byte what each would be alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.inference import InferRequest, OutputTensor, RequestedOutput
from serving.core.protocol import InferCodec
from serving.core.tensors import pack_bytes
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec

NUMERIC = sorted(n for n, d in DATATYPES.items() if d.itemsize and n not in ("FP16", "BF16"))


def codec(*outputs: TensorSpec, batch: Batch = Batch.DYNAMIC) -> InferCodec:
    return InferCodec("m", "1", Signature((TensorSpec("x", "FP32", (-1, 1)),), outputs, batch), 64)


def requests(*rows: int, id: str | None = None, outputs=None) -> list[InferRequest]:
    return [InferRequest(id, n, [], (), ((n, 1),), outputs=outputs) for n in rows]


def alone(taken: InferCodec, asked: list[InferRequest], arrays: list[np.ndarray]) -> list[bytes]:
    """Each request's response by itself."""
    bodies, at = [], 0
    for request in asked:
        end = at + request.rows
        parts = [a[at:end] for a in arrays]
        bodies.append(
            taken.encode(
                request, [OutputTensor(i, p.shape, p.tobytes()) for i, p in enumerate(parts)]
            ).body
        )
        at = end
    return bodies


def at_once(taken: InferCodec, asked: list[InferRequest], arrays: list[np.ndarray]):
    tensors = [memoryview(a.tobytes()) for a in arrays]
    return taken.encode_batch(asked, [a.shape for a in arrays], tensors)


@pytest.mark.parametrize("datatype", NUMERIC)
@pytest.mark.parametrize("tail", [(), (1,), (3,), (2, 3)])
@given(rows=st.lists(st.integers(1, 4), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_each_response_is_what_it_would_be_alone(datatype, tail, rows, seed) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2 if datatype == "BOOL" else 120, (sum(rows), *tail))
    arrays = [(values / 7 if "FP" in datatype else values).astype(DATATYPES[datatype].numpy)]
    arrays.append(np.arange(sum(rows), dtype="<i8"))
    taken = codec(TensorSpec("y", datatype, (-1, *tail)), TensorSpec("z", "INT64", (-1,)))
    asked = requests(*rows)
    asked[0].id = 'an "id"'
    assert at_once(taken, asked, arrays) == alone(taken, asked, arrays)


Y = TensorSpec("y", "FP32", (-1, 2))
FINE = np.ones((3, 2), np.float32)
UNFIT = np.array([[1, 2], [np.nan, 1], [np.inf, 0]], np.float32)


@pytest.mark.parametrize(
    ("taken", "asked", "array"),
    [
        pytest.param(codec(Y), requests(1, 2), UNFIT, id="NaN"),
        pytest.param(codec(Y), requests(1, 1), FINE, id="a row too many"),
        pytest.param(codec(Y), requests(1, 2), FINE[:, :1], id="another shape"),
        pytest.param(codec(Y), requests(1, 2), FINE[:, :0], id="no values"),
        pytest.param(codec(Y), requests(1, 2), FINE.astype("f8"), id="too many bytes"),
        pytest.param(codec(Y, Y), requests(1, 2), FINE, id="an output is missing"),
        pytest.param(codec(Y, batch=Batch.NONE), requests(1, 2), FINE, id="no batch dimension"),
        pytest.param(
            codec(Y), requests(1, 2, outputs=(RequestedOutput(0, True),)), FINE, id="binary"
        ),
        pytest.param(
            codec(TensorSpec("y", "FP16", (-1, 2))), requests(1, 2), FINE.astype("f2"), id="FP16"
        ),
    ],
)
def test_what_cannot_be_encoded_at_once_is_left_to_each(taken, asked, array) -> None:
    assert at_once(taken, asked, [array]) is None


def test_strings_are_left_to_each() -> None:
    taken = codec(TensorSpec("y", "BYTES", (-1,)))
    raw = memoryview(pack_bytes([b"a", b"b"]))
    assert taken.encode_batch(requests(1, 1), [(2,)], [raw]) is None
