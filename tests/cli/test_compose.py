"""Settings that an embedded Ray does not take, and GPUs that it counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving import compose
from serving.config import parse_config
from serving.errors import ClusterError
from tests.fake_nvml import FakeNvml
from tests.fake_nvml import whole as whole_gpu


@pytest.mark.usefixtures("ray_serve")
@pytest.mark.filterwarnings("ignore")  # Serve's import warns
def test_options_that_serve_does_not_take_are_one_sentence(tmp_path: Path) -> None:
    raw = {"home": str(tmp_path), "gateway": {"resources": {"slot": 1e-9}}}
    with pytest.raises(ClusterError, match="cannot deploy: The precision") as caught:
        compose.deploy(parse_config(raw, source="test"), embedded=True)
    assert "\n" not in str(caught.value)


def test_a_ray_that_is_slow_to_start_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = ["The current node timed out during startup.", "It timed out again.", "Others."]
    did = []

    class Ray:
        @staticmethod
        def init(**_: object) -> None:
            did.append("start")
            raise RuntimeError(errors.pop(0))

    monkeypatch.setattr(compose, "stop_ray", lambda: did.append("stop"))
    for words in ("It timed out again", "Others"):
        with pytest.raises(RuntimeError, match=words):
            compose._init_ray(Ray, parse_config({}, source="test"), tmp_path)
    assert did == ["start", "stop", "start", "start"]


@pytest.mark.filterwarnings("ignore")  # Ray's import warns
def test_what_ray_starts_has_a_session_of_its_own_each_time() -> None:
    from ray._private import utils

    for _ in range(2):
        with compose._own_sessions():
            in_child = utils.set_kill_on_parent_death_linux
        done = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"],
            preexec_fn=in_child,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "True\n"


def test_ray_counts_what_work_can_be_placed_on(
    nvml_here: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A divided GPU is as many devices as it has slices; what the operator hides is not counted."""
    slices = [nvml_here.slice(0, slot, f"{slot} 0") for slot in (0, 1)]
    whole = whole_gpu(1)["uuid"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert compose._claim_gpus() == 3
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join([*slices, whole])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert compose._claim_gpus() == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == whole
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compose._claim_gpus() == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
