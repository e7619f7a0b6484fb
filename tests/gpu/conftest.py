"""What needs a CUDA GPU. Without one all of it is skipped, or fails where a GPU is required."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from serving.replica.backends.cuda import missing_cuda

ROOT: Final = Path(__file__).resolve().parents[2]
REQUIRED: Final = "SERVING_TEST_GPU_REQUIRED"

Child = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if reason := missing_cuda():
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, and there is no GPU to test on: {reason}")
        pytest.skip(f"needs a GPU: {reason}")


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short path: a unix socket's has at most 107 characters, and tmp_path may have more."""
    with tempfile.TemporaryDirectory(prefix="sg-") as directory:
        yield Path(directory) / "run"


@pytest.fixture
def child() -> Child:
    """Runs a script of tests/gpu in a process of its own; gives the JSON that it prints last.

    A CUDA context is per process, and so are its memory, its limits, and its end.
    """

    def run(script: str, *arguments: object, status: int = 0) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", f"tests.gpu.{script}", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == status, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer

    return run
