"""The rounds: loop and gateway in turn, model after model, every figure kept at once."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from benchmarks import deployments, machine
from benchmarks.errors import BenchmarkError
from benchmarks.gpu import load, report
from benchmarks.gpu.record import Record
from benchmarks.gpu.subjects import SUBJECTS, Subject
from benchmarks.machine import ROOT
from benchmarks.models import read_output
from benchmarks.wrk import Load
from models.zoo import catalogue
from serving.agent.nvml import Nvml
from serving.replica.backends.cuda import identity

_CONNECTIONS: Final = (1, 2, 4, 8, 16, 32)
_TOLERANCE: Final = 1e-2  # TF32
_PORTS: Final = {"gateway": {"port": 18000}, "control": {"port": 18002}}
# By default a replica of a version that was never measured gets what is estimated for it.
_GPU_MEMORY_BYTES: Final = 16 << 30


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and on what to measure."""

    rounds: int
    seconds: float
    device: str = "cuda"
    connections: Sequence[int] = _CONNECTIONS


def measure(names: Sequence[str], settings: Settings, out: Path) -> list[str]:
    """Measure each model in each round, then render; the names of those that failed.

    A model that fails is left out of later rounds; its log and what it had are in `out`.
    """
    driver, on = _device(settings.device)
    facts = {
        "machine": machine.describe(),
        "gpu": on,
        "driver": driver,
        "settings": {"rounds": settings.rounds, "seconds": settings.seconds},
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        trials = [
            Trial(SUBJECTS[name], settings, Path(directory) / name, _record(name, facts, out))
            for name in names
        ]
        for number in range(1, settings.rounds + 1):
            for trial in trials:
                if trial.record.failure is None:
                    _attempt(trial, f"{trial.subject.name} {number}/{settings.rounds}")
    for record in (trial.record for trial in trials):
        if record.measured:
            report.render(record.path)
    return [trial.subject.name for trial in trials if trial.record.failure is not None]


def _record(name: str, facts: Mapping[str, Any], out: Path) -> Record:
    subject = SUBJECTS[name]
    about = {"what": subject.what, "request_rows": subject.request_rows}
    return Record(name, {**facts, **about}, out)


def _device(device: str) -> tuple[str | None, str]:
    """The driver's version, and the name of what is measured on."""
    if device == "cpu":
        return None, machine.cpu_model()
    return Nvml.open().driver, identity().name


def _attempt(trial: Trial, what: str) -> None:
    """Measure a round, and print what became of it."""
    started = time.monotonic()
    try:
        bare, served = trial.round()
    except Exception as error:
        # Of every kind: the next model may still be measured, and time on a GPU is short.
        reason = str(error) if isinstance(error, BenchmarkError) else repr(error)
        if not isinstance(error, BenchmarkError):
            with trial.record.log.open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
        trial.record.fail(f"{what}: {reason}")
        print(f"bench: {what}: {reason}", file=sys.stderr, flush=True)
        return
    print(
        f"{what}: bare {bare:,.0f} rows/s, gateway {served:,.0f} rows/s, ratio "
        f"{served / bare:.2f}, in {time.monotonic() - started:.0f} s",
        flush=True,
    )


class Trial:
    """One model to be measured, with its request and its gateway."""

    def __init__(self, subject: Subject, settings: Settings, scratch: Path, record: Record) -> None:
        self.subject = subject
        self.record = record
        self._settings = settings
        self._scratch = scratch

    def round(self) -> tuple[float, float]:
        """Measure once more; the best rows per second of the bare loop and of the gateway.

        Raises `BenchmarkError`, and what goes wrong where a model is made.
        """
        posted, system = self._served
        # The loop's process has ended, and its memory is free, before the gateway starts.
        answer = self._scratch / "answer.npy"
        self.record.bare(self._bare(answer))
        with deployments.started(system, _checker(posted, answer), self.record.log):
            for count in self._settings.connections:
                self.record.served(count, self._serve(posted, count))
        return self.record.end_round()

    @cached_property
    def _file(self) -> Path:
        return catalogue.build(self.subject.name, self._scratch / self.subject.name)

    @cached_property
    def _served(self) -> tuple[Load, deployments.System]:
        name, request = self.subject.name, self._scratch / "request.bin"
        config, home = self._scratch / "serving.yaml", self._scratch / "home"
        files = {name: self._file}
        body, json_bytes = self.subject.body()
        request.write_bytes(body)
        config.write_text(yaml.safe_dump(configuration(self.subject, self._settings.device)))
        posted = Load(deployments.infer_url(config, name), request, json_bytes)
        return posted, deployments.gateway(config, home, files)

    def _bare(self, answer: Path) -> dict[int, dict[str, float]]:
        name, settings = self.subject.name, self._settings
        command = [sys.executable, "-m", "benchmarks.gpu.bare", name, str(self._file)]
        done = subprocess.run(
            [*command, str(settings.seconds), str(answer), settings.device],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            self.record.log.write_text(done.stderr, encoding="utf-8")
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise BenchmarkError(f"the bare loop failed: {last[-300:]}; see {self.record.log}")
        told = json.loads(done.stdout.splitlines()[-1])
        return {int(size): figures for size, figures in told.items()}

    def _serve(self, posted: Load, connections: int) -> Mapping[str, float]:
        settings = self._settings
        found = load.measure(posted, connections, settings.seconds / len(settings.connections))
        return {**found, "rows_per_s": self.subject.request_rows * found["requests_per_s"]}


def configuration(subject: Subject, device: str) -> dict[str, Any]:
    """What the gateway is started with."""
    model: dict[str, Any] = {"device": device, "batching": {"max_size": subject.max_size}}
    if device != "cpu":
        model["gpu_memory_bytes"] = _GPU_MEMORY_BYTES
    return {**_PORTS, "models": {subject.name: model}}


def _checker(posted: Load, answer: Path) -> Callable[[], None]:
    """Posts the request once and compares with the bare loop's answer."""
    expected = np.load(answer)
    body, headers = (
        posted.body.read_bytes(),
        {"Inference-Header-Content-Length": str(posted.json_bytes)},
    )

    def check() -> None:
        request = urllib.request.Request(posted.url, data=body, headers=headers)
        with contextlib.closing(urllib.request.urlopen(request, timeout=60)) as reply:
            length = reply.headers.get("Inference-Header-Content-Length")
            found = read_output(reply.read(), None if length is None else int(length))
        scale = float(np.abs(expected).max())
        if found.shape != expected.shape or np.abs(found - expected).max() > _TOLERANCE * scale:
            raise BenchmarkError(f"{posted.url} gives another answer than the bare loop")

    return check
