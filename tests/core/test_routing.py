"""Signatures and route tables survive their JSON form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.routing import Arm, Endpoint, ModelRoute, RouteTable, Split
from serving.core.types import DATATYPE_BY_CODE, DATATYPES, Batch, Signature, TensorSpec
from serving.errors import ArtifactError

names = st.text(min_size=1, max_size=6)
specs = st.builds(
    TensorSpec,
    name=names,
    datatype=st.sampled_from(sorted(DATATYPES)),
    shape=st.lists(st.integers(-1, 2**40), max_size=4).map(tuple),
)
spec_tuples = st.lists(specs, min_size=1, max_size=3).map(tuple)
signatures = st.builds(
    Signature, spec_tuples, spec_tuples, st.sampled_from(Batch), st.integers(0, 64)
)
seconds = st.floats(0, 1e6)
arms = st.builds(
    Arm,
    model=names,
    version=names,
    digest=names,
    platform=names,
    signature=signatures,
    endpoints=st.lists(st.builds(Endpoint, names, names, names, names), max_size=2).map(tuple),
    role=names,
    max_size=st.integers(1, 64),
    max_delay_s=seconds,
    buckets=st.lists(st.integers(1, 64), max_size=3).map(tuple),
    queue_max_rows=st.integers(1, 9),
    queue_max_wait_s=seconds,
    queue_hold_s=seconds,
    timeout_s=seconds,
    usd_per_hour=st.none() | seconds,
    replicas=st.integers(1, 9),
)
models = st.builds(
    lambda name, version, arms: ModelRoute(name, version, {a.version: a for a in arms}),
    names,
    names,
    st.lists(arms, max_size=2),
)
tables = st.builds(
    lambda revision, models, complete: RouteTable(revision, {m.name: m for m in models}, complete),
    st.integers(0, 2**60),
    st.lists(models, max_size=2),
    st.booleans(),
)


@given(signatures)
def test_signature_round_trip(signature):
    assert Signature.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature


@given(tables)
def test_route_table_round_trip(table):
    assert RouteTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_a_split_round_trip_and_one_of_before_there_was_a_latency_bound():
    split = Split("m:1", 3, "2", 0.5, "salt", latency_bound_s=0.02)
    table = RouteTable(1, {"m": ModelRoute("m", "1", {}, split)})
    stored = json.loads(json.dumps(table.to_dict()))
    assert RouteTable.from_dict(stored) == table
    del stored["models"][0]["split"]["latency_bound_s"]
    (route,) = RouteTable.from_dict(stored).models.values()
    assert route.split.latency_bound_s is None


def test_datatype_codes_are_unique_and_sizes_agree_with_numpy():
    assert {d.name for d in DATATYPE_BY_CODE.values()} == set(DATATYPES)
    for datatype in DATATYPES.values():
        assert datatype.itemsize == (datatype.numpy.itemsize if datatype.numpy else 0)


X = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": ""}, "a tensor has no name"),
        ({"name": 3}, "a tensor has no name"),
        ({"datatype": "FP8"}, "'x' has datatype 'FP8'; allowed: BOOL"),
        ({"shape": "4"}, "'x' has shape '4'"),
        ({"shape": [-2]}, "'x' has shape"),
        ({"shape": [1.5]}, "'x' has shape"),
    ],
)
def test_malformed_tensors(change, says):
    with pytest.raises(ArtifactError, match=says):
        TensorSpec.from_dict({**X, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"outputs": []},
        {"inputs": None},
        {"inputs": [1]},
        {"batch": "some"},
        {"fixed_rows": "many"},
    ],
)
def test_malformed_signatures(change):
    good = {"inputs": [X], "outputs": [X], "batch": "dynamic"}
    assert Signature.from_dict(good).fixed_rows == 0
    with pytest.raises(ArtifactError, match="signature"):
        Signature.from_dict({**good, **change})
