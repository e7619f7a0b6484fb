"""Real memory on a real GPU: runs that do not fit, limits, and what a profile says."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.zoo import catalogue
from serving.artifacts import ONNX_PLATFORM
from serving.replica.backends.base import RuntimeOptions, load_model
from serving.replica.leaving import EXIT_DEVICE
from tests.gpu.conftest import ROOT, Child
from tests.replica.client import Client

pytestmark = pytest.mark.gpu
MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_run_that_does_not_fit_its_share_is_split_and_the_share_is_kept(
    child: Child, runtime: str
) -> None:
    found = child("memory_child", runtime, 256 * MIB, 3 * GIB, 64)
    assert found["oom_batches"] == 1
    assert found["ceiling"] in (4, 8)
    # The allocator keeps to the limit less the context; kernels that are loaded later come on top.
    assert found["held_bytes"] <= 1.1 * 3 * GIB
    assert found["nvml_bytes"] <= 1.1 * 3 * GIB


def test_a_run_that_does_not_fit_the_whole_gpu_is_split(child: Child) -> None:
    found = child("memory_child", "torch", 4 * GIB, 0, 256)
    assert found["oom_batches"] == 1
    assert found["ceiling"] is not None
    assert found["ceiling"] < 256


def test_a_convolution_that_does_not_fit_is_split(child: Child) -> None:
    """Whatever torch calls it: where cuDNN finds no room for a plan, it is not "out of memory"."""
    kinds = child("convolution_child")["kinds"]
    steps = [{"kind": kind, **step} for kind, found in kinds.items() for step in found]
    assert [step for step in steps if step["error"] is not None] == []
    assert max(step["off_by"] for step in steps) < 1e-2
    # Where not even the results fit, memory has run out for certain.
    tight = [step for step in steps if step["spare"] < 0]
    assert [step["oom_batches"] for step in tight] == [1] * len(kinds)
    assert all(step["ceiling"] <= 32 for step in tight)


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_limit_below_the_weights_is_refused(child: Child, runtime: str) -> None:
    found = child("refused_child", runtime)
    told = [found["refusal"]]
    if runtime == "onnx" and not found["nvml_knows_it"]:
        # The reading may have a neighbour's memory in it, so that ONNX models are warned of alone.
        told += found["logged"]
    assert any("does not fit into the memory of" in (line or "") for line in told)


def test_an_onnx_model_gets_to_the_gpu_without_torch(child: Child, tmp_path: Path) -> None:
    model = catalogue.build("mlp", tmp_path)
    found = child("torchless_child", model)
    assert (found["device"], found["torch"]) == ("cuda:0", False)
    on_cpu = load_model(model, ONNX_PLATFORM, RuntimeOptions("cpu"), None)
    (want,) = on_cpu.run([np.full((2, 64), 0.5, np.float32)])
    np.testing.assert_allclose(found["answer"], want, rtol=0, atol=1e-2 * want.max())


@pytest.fixture(scope="module")
def profiles() -> dict[str, Any]:
    """What was measured without a limit, by model: each takes a process and its start."""
    return {}


def unlimited(child: Child, profiles: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in profiles:
        profiles[name] = child("profile_child", name, 0)
    found: dict[str, Any] = profiles[name]
    return found


@pytest.mark.parametrize("name", ["resnet50", "transformer"])
def test_a_profile_is_what_nvml_reads(child: Child, profiles: dict[str, Any], name: str) -> None:
    found = unlimited(child, profiles, name)
    assert found["need_bytes"] == pytest.approx(found["nvml_bytes"], rel=0.1)
    assert list(found["profile"]["buckets"]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert found["profile"]["weights_bytes"] > 10 * MIB


@pytest.mark.parametrize("name", ["resnet50", "transformer"])
def test_a_profile_is_enough_for_a_lease(child: Child, profiles: dict[str, Any], name: str) -> None:
    free = unlimited(child, profiles, name)
    capped = child("profile_child", name, int(free["need_bytes"] / 0.9))
    assert capped["ceiling"] is None
    assert capped["nvml_bytes"] <= free["need_bytes"] / 0.9


def test_a_broken_context_ends_the_replica(run_dir: Path, tmp_path: Path) -> None:
    path, words = run_dir / "r.sock", tmp_path / "words"
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.breaking_child", path, words]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as replica:
        assert replica.stdout is not None
        assert replica.stdout.readline() == "ready\n"
        with Client.unix(str(path)) as client:
            assert client.infer(np.array([1, 7]))[0].shape == (2, 2)
            client.send_infer(np.array([99]))
            with contextlib.suppress(ConnectionResetError):
                assert client.sock.recv(1) == b""
        assert replica.wait(30) == EXIT_DEVICE
    assert "can run nothing more in this process" in words.read_text()
