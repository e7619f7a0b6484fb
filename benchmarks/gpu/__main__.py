"""ResNet-50 and a transformer encoder on a GPU: the gateway against a bare loop on the same GPU.

The bare loop runs the replica's own backend at each batch size; its best throughput is what the
gateway is held against. Clients post batches of 8 images or 16 sequences as binary tensors at
growing numbers of connections. Loop and gateway take turns, so that both meet the same clocks; the
ratio is the median of the rounds' ratios. Pictures with the curves lie beside the result.

    python -m benchmarks.gpu [--models resnet50 transformer] [--rounds 3] [--seconds 10]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from benchmarks import deployments, results
from benchmarks.errors import BenchmarkError
from benchmarks.gpu import load
from benchmarks.gpu.subjects import SUBJECTS, Subject
from benchmarks.machine import ROOT
from benchmarks.models import read_output
from benchmarks.results import Target
from benchmarks.wrk import Load
from models.zoo import catalogue
from serving.replica.backends.cuda import identity, missing_cuda

_CONNECTIONS: Final = (1, 2, 4, 8, 16, 32)
_TOLERANCE: Final = 1e-2  # TF32
_PORTS: Final = {"gateway": {"port": 18000}, "control": {"port": 18002}}

Figures = dict[str, Any]
Curve = dict[int, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and on what to measure."""

    rounds: int
    seconds: float
    device: str = "cuda"
    connections: Sequence[int] = _CONNECTIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 without a GPU, or where a request failed or was answered wrongly."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(SUBJECTS), default=sorted(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    options = parser.parse_args(arguments)
    if reason := missing_cuda():
        print(f"bench: this needs a CUDA GPU: {reason}", file=sys.stderr)
        return 1
    try:
        for name in options.models:
            with tempfile.TemporaryDirectory(prefix="bench-") as directory:
                settings = Settings(options.rounds, options.seconds)
                measured = run(SUBJECTS[name], Path(directory), settings)
            report(SUBJECTS[name], measured, settings, identity().name)
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130
    return 0


def run(subject: Subject, scratch: Path, settings: Settings) -> list[Figures]:
    """The figures of each round: {"bare": {rows: …}, "gateway": {connections: …}, "ratio"}."""
    file = catalogue.build(subject.name, scratch / subject.name)
    body, json_bytes = subject.body()
    request = scratch / "request.bin"
    request.write_bytes(body)
    config = scratch / "serving.yaml"
    config.write_text(yaml.safe_dump(_configuration(subject, settings.device)))
    posted = Load(deployments.infer_url(config, subject.name), request, json_bytes)
    system = deployments.gateway(config, scratch / "home", {subject.name: file})
    measured = []
    for number in range(1, settings.rounds + 1):
        # The loop's process has ended, and its memory is free, before the gateway starts.
        answer = scratch / "answer.npy"
        bare = _bare(subject, file, answer, settings)
        with deployments.started(system, _checker(posted, answer)):
            served = {
                count: _served(subject, posted, count, settings) for count in settings.connections
            }
        figures = {"bare": bare, "gateway": served, "ratio": _best(served) / _best(bare)}
        measured.append(figures)
        print(
            f"{subject.name} {number}/{settings.rounds}: bare {_best(bare):,.0f} rows/s, gateway "
            f"{_best(served):,.0f} rows/s, ratio {figures['ratio']:.2f}",
            flush=True,
        )
    return measured


def _configuration(subject: Subject, device: str) -> Figures:
    model = {"device": device, "batching": {"max_size": subject.max_size}}
    return {**_PORTS, "models": {subject.name: model}}


def _bare(subject: Subject, file: Path, answer: Path, settings: Settings) -> Curve:
    command = [sys.executable, "-m", "benchmarks.gpu.bare", subject.name, str(file)]
    done = subprocess.run(
        [*command, str(settings.seconds), str(answer), settings.device],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"the bare loop failed: {(done.stderr.strip() or '-')[-300:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return {int(size): figures for size, figures in told.items()}


def _served(
    subject: Subject, posted: Load, connections: int, settings: Settings
) -> dict[str, float]:
    found = load.measure(posted, connections, settings.seconds / len(settings.connections))
    return {**found, "rows_per_s": subject.request_rows * found["requests_per_s"]}


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


def _best(figures: Mapping[int, Mapping[str, float]]) -> float:
    return max(each["rows_per_s"] for each in figures.values())


def report(subject: Subject, measured: Sequence[Figures], settings: Settings, gpu: str) -> Path:
    """Write the result and its picture; the JSON file's path."""
    from benchmarks.gpu import plots

    summary = results.median_of(measured)
    ratio = statistics.median(figures["ratio"] for figures in measured)
    target = Target("rows per second, against the bare loop's best", ratio, 0.9, True, "×")
    bare = [
        [str(n), results.number(each["rows_per_s"]), results.number(each["run_ms"])]
        for n, each in sorted(summary["bare"].items())
    ]
    columns = ("rows_per_s", "p50_ms", "p99_ms")
    served = [
        [str(n), *(results.number(each[key]) for key in columns)]
        for n, each in sorted(summary["gateway"].items())
    ]
    text = "\n\n".join(
        [
            f"{subject.what}, on {gpu}; {subject.request_rows} rows a request. Failed requests: 0.",
            results.table(["rows in a bare run", "rows/s", "run ms"], bare),
            results.table(["connections", "rows/s", "p50 ms", "p99 ms"], served),
            results.targets_table([target]),
        ]
    )
    body = {
        "gpu": gpu,
        "settings": {"rounds": settings.rounds, "seconds": settings.seconds},
        "summary": summary,
        "rounds": measured,
    }
    path = results.write(f"gpu-{subject.name}", body, [target], text)
    plots.draw(f"{subject.what}, on {gpu}", summary, path.with_suffix(".png"))
    print(f"\n{text}\n\nwritten to {path}")
    return path


if __name__ == "__main__":
    sys.exit(main())
