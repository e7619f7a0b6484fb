from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.artifacts import ONNX_PLATFORM
from serving.core.types import Signature
from serving.replica.backends.base import Backend
from serving.replica.engine import Engine
from serving.replica.inspect import inspect
from serving.replica.rules import rules_for
from serving.replica.server import ReplicaServer, TlsListener

from . import models

IDENTITY = {"model": "m", "version": "3", "digest": "sha256:0", "replica": "r1"}
Serve = Callable[..., ReplicaServer]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short path: a unix socket's has at most 107 characters, and tmp_path may have more."""
    with tempfile.TemporaryDirectory(prefix="sg-") as directory:
        yield Path(directory) / "run"


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Serve]:
    """Starts a frame server for a backend."""
    with ExitStack() as stack:

        def start(
            backend: Backend,
            *,
            max_size: int = 64,
            buckets: tuple[int, ...] | None = None,
            tls: TlsListener | None = None,
        ) -> ReplicaServer:
            engine = Engine(backend, rules_for(backend, max_size, buckets))
            server = ReplicaServer(engine, run_dir / f"{os.urandom(4).hex()}.sock", IDENTITY, tls)
            server.start()
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def linear_backend(tmp_path: Path) -> Backend:
    return models.cpu_backend(models.linear(tmp_path / "m.onnx"), ONNX_PLATFORM, models.LINEAR)


def rows(n: int, seed: int = 0) -> np.ndarray:
    """Inputs of the linear model."""
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


class Gate:
    """A backend that runs another, but waits before each run until `open` is called.

    `batches` holds the row count of each run's first input; `entered` is released at each start.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.signature: Signature = inner.signature
        self.platform, self.device, self.precision = inner.platform, inner.device, inner.precision
        self.meter = inner.meter
        self.batches: list[int] = []
        self.entered = threading.Semaphore(0)
        self._may_run = threading.Semaphore(0)

    def open(self, runs: int = 1000) -> None:
        self._may_run.release(runs)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.batches.append(len(inputs[0]))
        self.entered.release()
        assert self._may_run.acquire(timeout=30)
        return self.inner.run(inputs)

    def check(self) -> None:
        self.inner.check()

    def close(self) -> None:
        self.inner.close()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
    """Poll until `condition` holds; fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.001)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def look(model: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return inspect(model, out, **{"sample": None, "signature": None, "batch": "auto", **settings})


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path
