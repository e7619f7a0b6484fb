"""A real replica of a real deployment on a real GPU: its lease, what it announces, what is left."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.zoo import catalogue
from serving.artifacts import ONNX_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends import cuda
from serving.replica.backends.base import RuntimeOptions, load_model
from tests.e2e.deployment import Deployment, eventually, register
from tests.gpu import reading
from tests.gpu.conftest import Tell

pytestmark = [pytest.mark.gpu, pytest.mark.cluster, pytest.mark.timeout(280)]
MIB = 1 << 20
SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("p", "FP32", (-1, 10)),), Batch.DYNAMIC
)


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    return catalogue.build("mlp", tmp_path / "mlp")


@pytest.fixture
def home(tmp_path: Path, mlp: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    home.mkdir()
    register(home, ["mlp", mlp, "--alias", "champion"])
    yield home
    # Shown where the test failed: the machine may be gone when somebody asks why.
    if (log := home / "up.log").exists():
        print(log.read_text(encoding="utf-8"))


def test_an_onnx_replica_serves_from_the_gpu_that_its_lease_is_of(
    home: Path, mlp: Path, tell: Tell
) -> None:
    before = reading.Device()
    models = {"mlp": {"version": "@champion", "device": "cuda"}}
    # As a module: where packages came with `pip --target`, the script lies anywhere.
    with Deployment(home, models, [sys.executable, "-m", "serving"]) as running:
        (version,) = running.status()["models"][0]["versions"]
        (replica,) = version["replicas"]
        gpu = eventually(lambda: _leased(running), "the GPU is measured, and its replica known")
        planned = eventually(lambda: _profiled(running), "the replica's profile is known")
        x = np.random.default_rng(1).standard_normal((8, 64), dtype=np.float32)
        answer = _infer(running, x)
        held = before.grown_bytes()
        tell(replica=replica, gpu=gpu, planned=planned, held_bytes=held)
        (holder,) = gpu["replicas"]
        assert replica["device"] == "cuda:0"
        assert holder["pid"] == replica["pid"]
        assert gpu["uuid"].partition("-")[2] == cuda.identity().bare_uuid
        assert planned["slots"] == [{"uuid": gpu["uuid"], "replica": replica["replica"]}]
        # It was never measured before, so its lease is the estimate; it fits, and nothing ran out.
        assert holder["lease_bytes"] >= 1024 * MIB
        assert planned["bytes"] <= holder["lease_bytes"]
        assert 100 * MIB < held <= holder["lease_bytes"]
        assert planned["ceilings"] == {}
        (expected,) = load_model(mlp, ONNX_PLATFORM, RuntimeOptions("cpu"), SIGNATURE).run([x])
        np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-2 * expected.max())
        assert running.stop() == 0
    eventually(lambda: before.grown_bytes() < 64 * MIB, "the GPU's memory is free again", 30)


def _leased(running: Deployment) -> dict[str, Any] | None:
    """The GPU that somebody holds a lease of, once it was measured."""
    gpus = running.get(running.control_port, "/v1/gpus")["gpus"]
    return next((g for g in gpus if g["replicas"] and g["sample"]), None)


def _profiled(running: Deployment) -> dict[str, Any] | None:
    """The plan of the model, once it goes by what the replica measured."""
    (planned,) = running.get(running.control_port, "/v1/plan")["models"]
    return None if planned["estimated"] else planned


def _infer(running: Deployment, x: np.ndarray) -> np.ndarray:
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
    request = urllib.request.Request(
        f"http://127.0.0.1:{running.port}/v2/models/mlp/infer",
        json.dumps({"inputs": [tensor]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        (output,) = json.load(reply)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])
