"""What needs a CUDA GPU. Without one all of it is skipped, or refused where a GPU is required."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.gpu import preflight
from serving.replica.backends.cuda import missing_cuda

ROOT: Final = Path(__file__).resolve().parents[2]
REQUIRED: Final = "SERVING_TEST_GPU_REQUIRED"

Child = Callable[..., dict[str, Any]]
Tell = Callable[..., None]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where a GPU is required, say once what is absent, not once a test."""
    wanted = any(item.get_closest_marker("gpu") for item in items)
    # A worker of pytest-xdist cannot end the run: its tests fail one by one.
    if not wanted or not os.environ.get(REQUIRED) or hasattr(config, "workerinput"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = preflight.problem()
    if problem:
        raise pytest.UsageError(f"{REQUIRED} is set, and the tests {problem}")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if reason := missing_cuda():
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(f"needs a GPU: {reason}")


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short path: a unix socket's has at most 107 characters, and tmp_path may have more."""
    with tempfile.TemporaryDirectory(prefix="sg-") as directory:
        yield Path(directory) / "run"


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Prints what a test measured, at once and whether it passes or not.

    Time on a GPU is short: what was measured is to be there even if the run is cut off.
    """

    def show(**figures: object) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name}: {json.dumps(figures, default=str)}", flush=True)

    return show


@pytest.fixture
def child(tell: Tell) -> Child:
    """Runs a script of tests/gpu in a process of its own; gives and tells the JSON it prints.

    A CUDA context is per process, and so are its memory, its limits, and its end.
    """

    def run(script: str, *arguments: object) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", f"tests.gpu.{script}", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        tell(**answer)
        return answer

    return run
