"""Directories of an embedded Ray, and settings that it does not take."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from serving import compose
from serving.config import parse_config
from serving.errors import ClusterError
from tests.fake_nvml import FakeNvml
from tests.fake_nvml import whole as whole_gpu

SOCKET_PATH = 107
SESSION = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SOCKET = "12345678/r-1234567890123456.sock"


@pytest.fixture
def long_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / ("long" * 20)
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


def test_sockets_fit_where_the_temporary_directory_is_long(long_temp: Path) -> None:
    assert tempfile.gettempdir() == str(long_temp)
    directory = compose.make_ray_dir()
    try:
        assert len(str(directory / SESSION)) <= SOCKET_PATH
        assert directory.is_dir()
    finally:
        directory.rmdir()
    prefix = compose.run_prefix(long_temp / "home", embedded=True)
    assert len(prefix + SOCKET) <= SOCKET_PATH


def test_a_short_temporary_directory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="sg-", dir="/tmp") as parent:
        monkeypatch.setenv("RAY_TMPDIR", parent)
        assert compose.make_ray_dir().parent == Path(parent)
        monkeypatch.setenv("RAY_TMPDIR", f"{parent}/none")
        with pytest.raises(ClusterError, match=f"{parent}/none: No such file"):
            compose.make_ray_dir()


@pytest.mark.usefixtures("ray_serve")
@pytest.mark.filterwarnings("ignore")  # Serve's import warns
def test_options_that_serve_does_not_take_are_one_sentence(tmp_path: Path) -> None:
    raw = {"home": str(tmp_path), "gateway": {"resources": {"slot": 1e-9}}}
    with pytest.raises(ClusterError, match="cannot deploy: The precision") as caught:
        compose.deploy(parse_config(raw, source="test"), embedded=True)
    assert "\n" not in str(caught.value)


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
