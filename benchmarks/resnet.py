"""ResNet-50 through the gateway against the same session in a bare loop.

Two questions. Throughput: eight clients send one 224×224×3 FP32 image a request as a binary tensor;
how near does the gateway come to a loop that does nothing but run a session with the replica's
options at its best batch size? Transport: what does a request of eight images (4.8 MB) add to the
run of the model itself?

The second is asked of a model that takes the same images and costs next to nothing: its requests
and bare runs take turns, and the difference of their medians is what a request adds. A run of
ResNet-50 varies by more than that between two runs, so there each request is compared with its own
run, which the answer states. It is asked twice: a system whose TCP paces what it sends (BBR) does
so on the loopback device too, where there is nothing to pace for, and the client is held back
before the gateway sees a byte. So one client has the system's congestion control and one has Reno,
which does not pace; the targets are held against the latter.

    python -m benchmarks.resnet [--rounds 5] [--seconds 8]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import deployments, models, processes, results, wrk
from benchmarks.client import Answer, Client, system_congestion
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from benchmarks.results import Target
from models.zoo import catalogue as zoo
from serving.config import load_config
from serving.replica.backends.onnx import session_options

CONFIG = ROOT / "benchmarks" / "configs" / "resnet.yaml"
_CLIENTS = 8
_SWEEP = (1, 2, 4, 8)
_BATCH = 8  # images in a request of the transport measurement: 4.8 MB
_BLOCK = 5  # bare runs, then as many requests of each client
_UNPACED = "reno"
_TRANSPORT = {  # the figures of `_added`, as columns
    "bare_ms": "bare run ms",
    "latency_ms": "request ms",
    "over_bare_ms": "more than a bare run",
    "over_own_run_ms": "more than its own run",
}

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """One model: its bare session, and its requests of one image and of `_BATCH` images."""

    name: str
    session: Any
    single: wrk.Load
    batch: wrk.Load

    def check(self, load: wrk.Load, rows: models.Rows) -> None:
        """Post `load` and compare with the bare session's answer on `rows`."""
        expected = self.session.run(None, {"image": rows})[0]
        deployments.check_answer(load.url, load.body.read_bytes(), load.json_bytes, expected)

    def run_s(self, rows: models.Rows) -> float:
        """How long one bare run takes, in seconds."""
        started = time.perf_counter()
        self.session.run(None, {"image": rows})
        return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both measurements; 1 where any request failed or the gateway misbehaved."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            _run(Path(directory), options.rounds, options.seconds)
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130
    return 0


def _run(scratch: Path, rounds: int, seconds: float) -> None:
    files = {
        "resnet50": zoo.build("resnet50", scratch / "resnet50"),
        "image_mean": models.write_image_mean(scratch / "image_mean"),
    }
    resnet, cheap = (_subject(name, file, scratch) for name, file in files.items())
    system = deployments.gateway(CONFIG, scratch / "home", files)
    measured: list[Figures] = []

    def check() -> None:
        for subject in (resnet, cheap):
            subject.check(subject.single, models.images(1))
            subject.check(subject.batch, models.images(_BATCH))

    with deployments.started(system, check) as running:
        for number in range(1, rounds + 1):
            with processes.Meter(running.pid) as meter:
                figures = _round(resnet, cheap, seconds)
            figures["cpu_s"], figures["others_cpu"] = dict(meter.by_role), meter.others
            measured.append(figures)
            print(f"round {number}/{rounds}  {_brief(figures)}", flush=True)
    _report(measured, {"rounds": rounds, "seconds": seconds})


def _subject(name: str, file: Path, scratch: Path) -> Subject:
    loads = []
    for rows in (1, _BATCH):
        body, json_bytes = models.binary_body("image", models.images(rows))
        path = scratch / f"images-{rows}.bin"
        path.write_bytes(body)
        loads.append(wrk.Load(deployments.infer_url(CONFIG, name), path, json_bytes))
    return Subject(name, _bare_session(name, file), *loads)


def _bare_session(name: str, file: Path) -> Any:
    import onnxruntime as ort

    settings = load_config(CONFIG).models[name].onnx.model_dump(mode="json")
    return ort.InferenceSession(
        str(file), session_options(settings), providers=["CPUExecutionProvider"]
    )


def _round(resnet: Subject, cheap: Subject, seconds: float) -> Figures:
    """Bare and served runs in turn, so that both meet the same state of the machine."""
    bare = {rows: _bare_rate(resnet, rows, seconds / len(_SWEEP)) for rows in _SWEEP}
    rate, p50_ms = _served(resnet, seconds)
    return {
        "bare_images_per_s": bare,
        "gateway_images_per_s": rate,
        "gateway_p50_ms": p50_ms,
        "transport": {each.name: _transport(each, seconds) for each in (cheap, resnet)},
    }


def _bare_rate(subject: Subject, rows: int, seconds: float) -> float:
    """Images per second of a loop of runs on `rows` images each."""
    feed = models.images(rows)
    subject.run_s(feed)
    runs, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or not runs:
        subject.run_s(feed)
        runs += 1
    return rows * runs / spent


def _served(subject: Subject, seconds: float) -> tuple[float, float]:
    """Images per second and median latency (ms) of `_CLIENTS` clients.

    No client begins a request after `seconds`, and time runs until the last answer is there: each
    image that was worked on counts, none that was not.
    """
    started = time.perf_counter()

    def client(_: int) -> list[float]:
        latencies: list[float] = []
        with Client(subject.single) as connection:
            while time.perf_counter() - started < seconds or not latencies:
                latencies.append(connection.post().latency_ms)
        return latencies

    with ThreadPoolExecutor(_CLIENTS) as pool:
        latencies = [ms for each in pool.map(client, range(_CLIENTS)) for ms in each]
    return len(latencies) / (time.perf_counter() - started), statistics.median(latencies)


def _transport(subject: Subject, seconds: float) -> Figures:
    """What a request of `_BATCH` images costs, by congestion control of the client."""
    feed = models.images(_BATCH)
    bare: list[float] = []
    with ExitStack() as stack:
        names = dict.fromkeys((_UNPACED, system_congestion()))
        clients = {name: stack.enter_context(Client(subject.batch, name)) for name in names}
        answers: dict[str, list[Answer]] = {name: [] for name in clients}
        for client in clients.values():
            client.post()
        end = time.perf_counter() + seconds
        while not bare or time.perf_counter() < end:
            bare += [subject.run_s(feed) * 1e3 for _ in range(_BLOCK)]
            for name, client in clients.items():
                answers[name] += [client.post() for _ in range(_BLOCK)]
    return {name: _added(statistics.median(bare), given) for name, given in answers.items()}


def _added(bare_ms: float, answers: Sequence[Answer]) -> Figures:
    latency = statistics.median(answer.latency_ms for answer in answers)
    return {
        "bare_ms": bare_ms,
        "latency_ms": latency,
        "over_bare_ms": latency - bare_ms,
        "over_own_run_ms": statistics.median(a.latency_ms - a.run_ms for a in answers),
    }


def _brief(figures: Figures) -> str:
    bare = {rows: round(rate, 1) for rows, rate in figures["bare_images_per_s"].items()}
    added = {
        f"{model} {client}": round(each["over_own_run_ms"], 2)
        for model, by_client in figures["transport"].items()
        for client, each in by_client.items()
    }
    served = figures["gateway_images_per_s"]
    return f"bare {bare}  gateway {served:.1f} images/s  over own run {added} ms"


def _report(measured: Sequence[Figures], settings: Mapping[str, Any]) -> None:
    summary = results.median_of(measured)
    targets = _targets(measured, summary)
    bare = [
        [f"bare loop, batch {n}", results.number(rate), ""]
        for n, rate in summary["bare_images_per_s"].items()
    ]
    rate, p50 = summary["gateway_images_per_s"], summary["gateway_p50_ms"]
    served = [f"gateway, c={_CLIENTS}", results.number(rate), results.number(p50)]
    transport = [
        [model, client, *(results.number(figures[key]) for key in _TRANSPORT)]
        for model, by_client in summary["transport"].items()
        for client, figures in by_client.items()
    ]
    head = ["4.8 MB request", "client's TCP", *_TRANSPORT.values()]
    others = max(figures["others_cpu"] for figures in measured)
    text = "\n\n".join(
        [
            results.table(["ResNet-50", "images/s", "p50 ms"], [*bare, served]),
            results.table(head, transport),
            results.targets_table(targets),
            f"Failed requests: 0. Other programs took at most {others:.0%} of the machine's CPU.",
        ]
    )
    body = {"settings": settings, "summary": summary, "rounds": measured}
    path = results.write("resnet", body, targets, text)
    print(f"\n{text}\n\nwritten to {path}")


def _targets(measured: Sequence[Figures], summary: Figures) -> list[Target]:
    rates = summary["bare_images_per_s"]
    best = max(rates, key=lambda rows: rates[rows])
    ratio = statistics.median(
        figures["gateway_images_per_s"] / figures["bare_images_per_s"][best] for figures in measured
    )
    transport = summary["transport"]
    cheap = transport["image_mean"][_UNPACED]["over_bare_ms"]
    resnet = transport["resnet50"][_UNPACED]["over_own_run_ms"]
    loop = f"images per second, c={_CLIENTS}, against a bare loop at batch {best}"
    return [
        Target(loop, ratio, 0.95, True, "×"),
        Target("4.8 MB request, more than a bare run, image_mean", cheap, 3, False, "ms"),
        Target("4.8 MB request, more than its own run, resnet50", resnet, 3, False, "ms"),
    ]


if __name__ == "__main__":
    sys.exit(main())
