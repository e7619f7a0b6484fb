"""Start one system in its own processes, check its answers, stop it without a trace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from benchmarks import models, processes
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from models.processes import session
from serving.config import load_config

# Not the script: where packages came with `pip --target`, it lies anywhere or nowhere.
SERVING = (sys.executable, "-m", "serving")
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class System:
    """How to start one system. `data_path`: the roles (`processes.role`) that carry requests."""

    name: str
    description: str
    command: Sequence[str]
    url: str
    data_path: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """A started system and its root process."""

    system: System
    pid: int


def gateway(config: Path, home: Path, registered: Mapping[str, Path]) -> System:
    """Our gateway with the configuration as it is, its state in `home`.

    Registers `registered` (name to model file) first, each as @champion. The system's URL is the
    infer address of the first.
    """
    environment = {"SERVING_HOME": str(home)}
    for name, path in registered.items():
        serving(["register", name, str(path), "--alias", "champion"], environment)
    model = next(iter(registered))
    return System(
        "gateway",
        "this gateway: one gateway replica, one model replica",
        [*SERVING, "up", "-f", str(config)],
        infer_url(config, model),
        ("ServeReplica:gateway:", "ServeReplica:model-"),
        environment,
    )


def infer_url(config: Path, model: str) -> str:
    """Where a gateway with this configuration takes requests for `model`."""
    return f"http://127.0.0.1:{load_config(config).gateway.port}/v2/models/{model}/infer"


def serving(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run one `serving` command to its end. Raises `BenchmarkError` where it fails."""
    done = subprocess.run(
        [*SERVING, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise BenchmarkError(
            f"serving {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}"
        )


@contextlib.contextmanager
def started(
    system: System, check: Callable[[], None], log: Path | None = None
) -> Iterator[Running]:
    """Start `system`, wait until `check` passes, stop it at the end.

    What it prints goes into the file `log` (a temporary one by default), which stays if this fails.
    `check` raises `OSError` while the system does not answer yet. Raises `BenchmarkError` where the
    system dies, never answers, answers wrongly, or leaves a process behind.
    """
    if log is None:
        handle, name = tempfile.mkstemp(prefix=f"bench-{system.name}-", suffix=".log")
        os.close(handle)
        log = Path(name)
    with log.open("wb") as sink:
        # A session of its own: Ctrl-C reaches the benchmark, which then stops the system in order.
        process = subprocess.Popen(
            list(system.command),
            cwd=ROOT,
            env={**os.environ, **system.environment},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # SIGTERM ends a program without its `finally`, and the system, in its own session, would stay.
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        _wait(system, process, check, log)
        yield Running(system, process.pid)
        if process.poll() is not None:
            raise BenchmarkError(f"{system.name} ended while it was measured; see {log}")
        check()
    finally:
        # To be terminated once more, or only now, must not keep it from being stopped.
        terminated: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
        left = _stop(process)
        signal.signal(signal.SIGTERM, before)
        if terminated:
            _leave(terminated[0], None)
    if left:
        raise BenchmarkError(f"{system.name} left processes behind (now killed): {', '.join(left)}")
    log.unlink()


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def _wait(
    system: System, process: subprocess.Popen[bytes], check: Callable[[], None], log: Path
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise BenchmarkError(f"{system.name} did not start: " + " | ".join(tail))
        try:
            check()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise BenchmarkError(
                    f"{system.name} did not answer within {_START_TIMEOUT_S:.0f} s: {error}; "
                    f"see {log}"
                ) from error
            time.sleep(0.25)


def check_answer(url: str, body: bytes, json_bytes: int, expected: models.Rows) -> None:
    """Post an infer request and compare the first output of its answer with `expected`.

    `json_bytes` as in `wrk.Load`. Raises `OSError` (an `HTTPError` is one) where it is not answered
    with 200, `BenchmarkError` where the answer is wrong.
    """
    headers = {"Content-Type": "application/json"}
    if json_bytes:
        headers = {"Inference-Header-Content-Length": str(json_bytes)}
    request = urllib.request.Request(url, data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        length = reply.headers.get("Inference-Header-Content-Length")
        found = models.read_output(reply.read(), None if length is None else int(length))
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3, atol=1e-5):
        raise BenchmarkError(
            f"{url} answers {found.ravel()[:5]}… {found.shape}, "
            f"right is {expected.ravel()[:5]}… {expected.shape}"
        )


def _stop(process: subprocess.Popen[bytes]) -> list[str]:
    """Interrupt and wait; kill what is left and return its names."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(session(process.pid), timeout=10)
    left = []
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(f"{processes.role(survivor.cmdline())} (pid {survivor.pid})")
            survivor.kill()
    return left
