"""Fixtures of the fake NVML; `tests/conftest.py` brings them to every test."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pynvml
import pytest

from tests.fake_nvml import FakeNvml, build, whole


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


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
