"""ONNX Runtime's CUDA provider, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What the real onnxruntime-gpu loads for CUDA 13, where the wheels of NVIDIA put it.
_LIBRARIES = {
    "cu13": (
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libnvrtc.so.13",
        "libcurand.so.10",
        "libcufft.so.12",
        "libcudart.so.13",
    ),
    "cudnn": ("libcudnn.so.9",),
}
_PRELOAD = """
import json, sys
from serving.replica.backends.onnx_cuda import preload_libraries
said = preload_libraries()
loaded = sorted({line.split()[-1] for line in open("/proc/self/maps") if "/nvidia/" in line})
print(json.dumps({"said": said, "loaded": loaded, "torch": "torch" in sys.modules}))
"""


def preload(*path: Path) -> dict[str, object]:
    """What a process loads whose sys.path has these directories."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, Path.cwd())))}
    environment.pop("LD_LIBRARY_PATH", None)
    done = subprocess.run(
        [sys.executable, "-c", _PRELOAD],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A directory as `pip install --target` fills it with NVIDIA's wheels, libraries empty."""
    empty = tmp_path / "empty.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", empty]
    subprocess.run(command, check=True, timeout=60)
    for package, names in _LIBRARIES.items():
        directory = tmp_path / "site" / "nvidia" / package / "lib"
        directory.mkdir(parents=True)
        for name in names:
            shutil.copy(empty, directory / name)
    return tmp_path / "site"


def test_cuda_libraries_are_found_wherever_their_wheels_lie(wheels: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "nvidia" / "nvtx").mkdir(parents=True)
    found = preload(other, wheels)
    expected = [
        str(wheels / "nvidia" / package / "lib" / name)
        for package, names in _LIBRARIES.items()
        for name in names
    ]
    assert found == {"said": "", "loaded": sorted(expected), "torch": False}


def test_what_is_missing_is_told_and_not_printed(wheels: Path) -> None:
    missing = wheels / "nvidia" / "cu13" / "lib" / "libcublas.so.13"
    missing.unlink()
    said = preload(wheels)["said"]
    assert isinstance(said, str)
    assert said.startswith("Failed to load libcublas.so.13: ")
