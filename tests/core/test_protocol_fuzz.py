"""Hostile bodies: out comes a request that fits its model, or a refusal that says why."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.core.protocol import InferCodec, parse_json_length
from serving.core.tensors import pack_bytes
from serving.core.types import Batch, Signature
from serving.errors import InvalidRequest, PayloadTooLarge, Unsupported
from tests.core.protocol_cases import (
    LIMITS,
    MAX_ROWS,
    assert_fits,
    binary,
    body,
    signature,
    tensor,
)

REFUSALS = (InvalidRequest, Unsupported, PayloadTooLarge)


@dataclass
class Target:
    """A model, and valid bodies for it, each with the length of its JSON."""

    taken: Signature
    seeds: list[tuple[bytes, int | None]]
    codec: InferCodec = field(init=False)

    def __post_init__(self) -> None:
        self.codec = InferCodec("m", "1", self.taken, MAX_ROWS, LIMITS)
        for raw, length in self.seeds:
            assert_fits(self.codec.decode(raw, length), self.taken)

    def refuses(self, raw: bytes, length: int | None) -> bool:
        """Whether `raw` is refused; what is not must fit the signature."""
        try:
            request = self.codec.decode(raw, length)
        except REFUSALS as error:
            text = str(error)
            assert 10 < len(text) < 500, text
            assert "\n" not in text
            return True
        assert_fits(request, self.taken)
        return False


def targets() -> dict[str, Target]:
    floats = signature([("x", "FP32", (-1, 4))])
    mixed = signature(
        [("a", "INT8", (-1, -1)), ("b", "BOOL", (-1, 2)), ("s", "BYTES", (-1, 1))],
        [("p", "FP32", (-1, 3)), ("h", "FP16", (-1, 1))],
    )
    single = signature([("x", "UINT64", (-1, 2))], batch=Batch.NONE)
    half = signature([("x", "BF16", (-1, -1))])
    text = signature([("x", "BYTES", (-1, 2))])
    one, two = [1, 2.5, -3, 1e-9], [[1, 2, 3, 4], [5, 6, 7, 8]]
    parameters = {"priority": 1, "timeout": 5000, "binary_data_output": True, "sequence_id": 0}
    outputs = [
        {"name": "h", "parameters": {"binary_data": True}},
        {"name": "p", "parameters": {"classification": 2}},
    ]
    a, b = (
        tensor("a", "INT8", [2, 1], [-128, 127]),
        tensor("b", "BOOL", [2, 2], [[True, False]] * 2),
    )
    s = tensor("s", "BYTES", [2, 1], ["true", "é\n"])
    return {
        "floats": Target(
            floats,
            [
                (body(tensor("x", "FP32", [1, 4], one)), None),
                (body(tensor("x", "FP32", [2, 4], two), id="r-1", parameters=parameters), None),
                binary(("x", "FP32", [2, 4], bytes(range(32))), id=""),
                (bytes(16), 0),
            ],
        ),
        "mixed": Target(
            mixed,
            [
                (body(a, b, s, parameters=parameters), None),
                (body(s, b, a, id="1", outputs=outputs), None),
                binary(
                    ("s", "BYTES", [1, 1], pack_bytes([b"\xff\x00"])),
                    ("a", "INT8", [1, 3], b"abc"),
                    ("b", "BOOL", [1, 2], b"\x00\x01"),
                    outputs=outputs,
                ),
            ],
        ),
        "none": Target(single, [(body(tensor("x", "UINT64", [1, 2], [0, 2**64 - 1])), None)]),
        "half": Target(half, [binary(("x", "BF16", [1, 3], b"abcdef")), (b"abcd", 0)]),
        "text": Target(
            text,
            [
                (body(tensor("x", "BYTES", [1, 2], ["a", "b"])), None),
                binary(("x", "BYTES", [2, 2], pack_bytes([b"", b"a", b"bc", b"def"]))),
            ],
        ),
    }


TARGETS = targets()
# What a parser, a number conversion or a length check may trip over.
TOKENS = [
    *(bytes([c]) for c in b'[]{},:"\\0-1.eE\x00\xff '),
    *(b"null", b"true", b"false", b"NaN", b"Infinity", b"-Infinity", b"1e400", b"1e300", b"-0"),
    *(b"0.0", b"1.0", b"-1", b"256", b"-129", b"2147483648", b"9223372036854775808", b"1e-400"),
    *(b"18446744073709551616", b"9" * 400, b"[]", b"{}", b"[[]]", b'""', b'"x"', b'"\\ud800"'),
    *(b'"FP16"', b'"FP64"', b'"BYTES"', b'"inputs"', b'"data"', b'"shape"', b'"parameters":{}'),
    *(b'"binary_data_size"', b'"shared_memory_region":"r"', b'"sequence_id":7', b"\xef\xbb\xbf"),
    *(b"[" * 40, b'{"a":' * 2000),
]


def mutate(rng: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.choice((1, 1, 2, 4, 16)))
        piece = rng.choice(TOKENS)
        match rng.randrange(6):
            case 0:
                out[at:to] = b""
            case 1:
                out[at:at] = piece
            case 2:
                out[at:to] = piece
            case 3:
                out[at:at] = out[at:to]
            case 4:
                out[at:] = b""
            case _:
                out[at:to] = bytes(rng.randrange(256) for _ in range(to - at))
    return bytes(out)


def mutate_length(rng: random.Random, raw: bytes, length: int | None) -> int | None:
    if rng.random() < 0.7:
        return length
    return rng.choice((None, 0, 1, len(raw), len(raw) + 1, rng.randrange(len(raw) + 2), 10**17))


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_bytes(name):
    target, rng, refused = TARGETS[name], random.Random(name), 0
    for _ in range(6000):
        raw, length = rng.choice(target.seeds)
        mutant = mutate(rng, raw)
        refused += target.refuses(mutant, mutate_length(rng, mutant, length))
    # Some mutants stay valid; far more of them must not.
    assert refused > 3000
    for raw, length in target.seeds:
        assert not target.refuses(raw, length)


def test_every_truncation():
    refused = 0
    for target in TARGETS.values():
        for raw, length in target.seeds:
            if length != 0:
                cuts = range(len(raw))
                assert all(target.refuses(raw[:cut], length) for cut in cuts)
                refused += len(cuts)
    assert refused > 1000


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["x", "a", "b", "s", "FP32", "INT8", "BOOL", "BYTES", "p", "h"])
)
keys = st.text(max_size=3) | st.sampled_from(
    ["name", "shape", "datatype", "data", "parameters", "binary_data_size", "classification"]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
paths = st.lists(st.integers(0, 5), min_size=0, max_size=5)


def replace_at(value: object, path: list[int], new: object) -> object:
    """`value` with what lies at `path` (positions among members and items) replaced by `new`."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    at, rest = path[0] % len(value), path[1:]
    if isinstance(value, list):
        return [replace_at(v, rest, new) if i == at else v for i, v in enumerate(value)]
    key = list(value)[at]
    return {k: replace_at(v, rest, new) if k == key else v for k, v in value.items()}


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choice=st.integers(0, 9), path=paths, new=values)
def test_replaced_members(name, choice, path, new):
    target = TARGETS[name]
    framed = [(raw, length) for raw, length in target.seeds if length != 0]
    raw, length = framed[choice % len(framed)]
    message = json.loads(raw[:length])
    head = json.dumps(replace_at(message, path, new)).encode()
    tail = b"" if length is None else raw[length:]
    target.refuses(head + tail, None if length is None else len(head))


entries = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "a", "b", "s", "y"]) | scalars,
        "shape": st.lists(st.integers(-1, 5) | scalars, max_size=3) | values,
        "datatype": st.sampled_from(["FP32", "INT8", "BOOL", "BYTES", "UINT64"]) | scalars,
        "data": st.lists(scalars, max_size=9) | values,
        "parameters": st.dictionaries(keys, st.integers(0, 40) | scalars, max_size=3) | values,
    },
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "id": scalars,
        "inputs": st.lists(entries, max_size=3) | values,
        "outputs": st.lists(entries, max_size=3) | values,
        "parameters": st.dictionaries(
            st.sampled_from(["priority", "timeout", "binary_data_output", "sequence_id", "k"]),
            values,
            max_size=3,
        ),
        "model_name": values,
        "other": values,
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(TARGETS)),
    message=messages,
    tail=st.binary(max_size=20),
    off=st.sampled_from([0, 0, 0, 1, -1, 99]),
)
def test_built_messages(name, message, tail, off):
    head = json.dumps(message).encode()
    length = None if not tail and off == 0 else max(0, len(head) + off)
    TARGETS[name].refuses(head + tail, length)


@settings(max_examples=200, deadline=None)
@given(value=st.binary(max_size=25) | st.integers(-5, 10**30).map(lambda n: str(n).encode()))
def test_json_length_header(value):
    if value.isdigit() and len(value) <= 18:
        assert parse_json_length(value) == int(value)
        return
    with pytest.raises(InvalidRequest, match="Inference-Header-Content-Length"):
        parse_json_length(value)
