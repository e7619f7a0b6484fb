"""The bodies of the routes around inference."""

from __future__ import annotations

import pytest

from serving.core.inference import row_limit
from serving.core.metadata import (
    IndexEntry,
    model_config,
    model_metadata,
    model_ready,
    repository_index,
    server_live,
    server_metadata,
    server_ready,
)
from serving.core.routing import Arm
from serving.core.types import Batch
from tests.core.protocol_cases import signature

SIMPLE = Arm(
    model="simple_string",
    version="2",
    digest="sha256:0",
    platform="onnxruntime_onnx",
    signature=signature([("INPUT0", "BYTES", (-1, 16))], [("OUTPUT0", "INT32", (-1, 16))]),
    max_size=8,
    max_delay_s=0.0005,
    buckets=(4, 8),
    replicas=2,
)


def test_health_bodies():
    assert server_live(True) == {"live": True}
    assert server_ready(False) == {"ready": False}
    assert model_ready("m", True) == {"name": "m", "ready": True}


def test_server_metadata():
    assert server_metadata("s", "1.2", ("binary_tensor_data",)) == {
        "name": "s",
        "version": "1.2",
        "extensions": ["binary_tensor_data"],
    }


def test_model_metadata_includes_the_batch_dimension():
    assert model_metadata(SIMPLE, ["1", "2"]) == {
        "name": "simple_string",
        "versions": ["1", "2"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "INPUT0", "datatype": "BYTES", "shape": [-1, 16]}],
        "outputs": [{"name": "OUTPUT0", "datatype": "INT32", "shape": [-1, 16]}],
    }


def test_model_config_leaves_the_batch_dimension_out():
    assert model_config(SIMPLE) == {
        "name": "simple_string",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": 8,
        "input": [{"name": "INPUT0", "data_type": "TYPE_STRING", "dims": [16]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_INT32", "dims": [16]}],
        "instance_group": [{"name": "simple_string", "kind": "KIND_AUTO", "count": 2}],
        "dynamic_batching": {
            "preferred_batch_size": [4, 8],
            "max_queue_delay_microseconds": 500,
        },
    }


def test_model_config_without_batch_dimension():
    taken = signature([("x", "BF16", (3, -1))], batch=Batch.NONE)
    config = model_config(Arm("m", "1", "d", "pytorch_export", taken))
    assert (config["max_batch_size"], config["backend"]) == (0, "pytorch")
    assert config["input"] == [{"name": "x", "data_type": "TYPE_BF16", "dims": [3, -1]}]
    assert "dynamic_batching" not in config


@pytest.mark.parametrize(
    ("batch", "fixed_rows", "rows"),
    [(Batch.DYNAMIC, 0, 64), (Batch.FIXED, 8, 8), (Batch.FIXED, 128, 64), (Batch.NONE, 0, 0)],
)
def test_row_limit(batch, fixed_rows, rows):
    taken = signature([("x", "FP32", (-1,))], batch=batch, fixed_rows=fixed_rows)
    assert row_limit(taken, 64) == rows


def test_repository_index():
    entries = [IndexEntry("a", "1", "READY"), IndexEntry("b", "1", "UNAVAILABLE", "no GPU")]
    assert repository_index(entries, ready_only=False) == [
        {"name": "a", "version": "1", "state": "READY", "reason": ""},
        {"name": "b", "version": "1", "state": "UNAVAILABLE", "reason": "no GPU"},
    ]
    assert [e["name"] for e in repository_index(entries, ready_only=True)] == ["a"]
