"""Fixtures of the fake NVML; `tests/conftest.py` brings them to every test."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pynvml
import pytest

from tests.fake_nvml import FakeNvml, build, whole


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a `libcuda.so.1` that shows one GPU: see `cuda.c`."""
    directory = tmp_path_factory.mktemp("cuda")
    command = ["cc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o"]
    source = Path(__file__).with_name("cuda.c")
    subprocess.run([*command, directory / "libcuda.so.1", source], check=True, timeout=60)
    return directory


@pytest.fixture
def fake_nvml(nvml_library: Path, tmp_path: Path) -> FakeNvml:
    """Two A100s, for processes that get `fake_nvml.env`."""
    fake = FakeNvml(nvml_library, tmp_path / "nvml.state")
    fake.gpus(whole(0), whole(1))
    return fake


@pytest.fixture
def nvml_here(fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """The same, for pynvml in this process."""
    load_here(fake_nvml, monkeypatch)
    return fake_nvml


def load_here(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pynvml of this process use `fake`: it looks for the library only once."""
    monkeypatch.setenv("FAKE_NVML_STATE", str(fake.state))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(fake.library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
