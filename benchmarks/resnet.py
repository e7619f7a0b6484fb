"""ResNet-50 through the gateway against the same session in a bare loop.

Two questions. Throughput: eight clients send one 224×224×3 FP32 image a request as a binary tensor;
how near does the gateway come to a loop that does nothing but run the session at its best batch
size? Transport: what does a request of eight images (4.8 MB) add to the run of the model itself?
The second is asked of ResNet-50, and of a model that takes the same images and costs next to
nothing, because a millisecond cannot be seen beside the jitter of a run of hundreds.

    python -m benchmarks.resnet [--rounds 3] [--seconds 8]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import deployments, models, processes, results, wrk
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from benchmarks.results import Target
from models.zoo import catalogue as zoo

CONFIG = ROOT / "benchmarks" / "configs" / "resnet.yaml"
_CLIENTS = 8
_SWEEP = (1, 2, 4, 8)
_BATCH = 8  # images in a request of the transport measurement: 4.8 MB
_RUNS = 5
_MODELS = ("resnet50", "image_mean")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both measurements; 1 where any request failed or the gateway misbehaved."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            return _run(Path(directory), options.rounds, options.seconds)
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130


def _run(scratch: Path, rounds: int, seconds: float) -> int:
    files = {
        "resnet50": zoo.build("resnet50", scratch / "resnet50"),
        "image_mean": models.write_image_mean(scratch / "image_mean"),
    }
    resnet, cheap = (_subject(name, files[name], scratch) for name in _MODELS)
    system = deployments.gateway(CONFIG, scratch / "home", files)
    measured: list[dict[str, Any]] = []

    def check() -> None:
        for subject in (resnet, cheap):
            subject.check(subject.single, models.images(1))
            subject.check(subject.batch, models.images(_BATCH))

    with deployments.started(system, check) as running:
        for number in range(1, rounds + 1):
            with processes.Meter(running.pid) as meter:
                figures = _round(resnet, cheap, seconds)
            figures["cpu_s"] = dict(meter.by_role)
            measured.append(figures)
            print(
                f"round {number}/{rounds}  bare {figures['bare_images_per_s']}  gateway "
                f"{figures['gateway_images_per_s']:.1f} images/s  added "
                f"{figures['added_ms']}",
                flush=True,
            )
    return _report(measured, {"rounds": rounds, "seconds": seconds})


def _subject(name: str, file: Path, scratch: Path) -> Subject:
    loads = []
    for rows in (1, _BATCH):
        body, json_bytes = models.binary_body("image", models.images(rows))
        path = scratch / f"images-{rows}.bin"
        path.write_bytes(body)
        loads.append(wrk.Load(deployments.infer_url(CONFIG, name), path, json_bytes))
    return Subject(name, models.cpu_session(file), *loads)


def _round(resnet: Subject, cheap: Subject, seconds: float) -> dict[str, Any]:
    """Bare and served runs in turn, so that both meet the same state of the machine."""
    bare = {rows: rows / _median_run_s(resnet, rows, seconds / len(_SWEEP)) for rows in _SWEEP}
    served = wrk.run(resnet.single, connections=_CLIENTS, seconds=seconds)
    added, errors = {}, dict(served.errors)
    for subject in (resnet, cheap):
        run_ms = _median_run_s(subject, _BATCH, seconds / 2) * 1e3
        whole = wrk.run(subject.batch, connections=1, seconds=seconds / 2)
        added[subject.name] = round(whole.p50_ms - run_ms, 2)
        errors = {k: errors.get(k, 0) + whole.errors.get(k, 0) for k in {*errors, *whole.errors}}
    return {
        "bare_images_per_s": {rows: round(rate, 1) for rows, rate in bare.items()},
        "gateway_images_per_s": served.rps,
        "gateway_p50_ms": served.p50_ms,
        "gateway_p99_ms": served.p99_ms,
        "added_ms": added,
        "errors": errors,
    }


def _median_run_s(subject: Subject, rows: int, seconds: float) -> float:
    """The median time of a bare run on `rows` images, over `seconds` and at least `_RUNS` runs."""
    feed = {"image": models.images(rows)}
    subject.session.run(None, feed)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _RUNS or time.perf_counter() < end:
        started = time.perf_counter()
        subject.session.run(None, feed)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _report(measured: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> int:
    summary = results.median_of(measured)
    best = max(summary["bare_images_per_s"], key=lambda n: summary["bare_images_per_s"][n])
    bare = summary["bare_images_per_s"][best]
    targets = [
        Target(
            f"images per second, c={_CLIENTS}, against a bare loop at batch {best}",
            summary["gateway_images_per_s"] / bare,
            0.95,
            True,
            "×",
        ),
        *(
            Target(f"4.8 MB request adds, {name}", summary["added_ms"][name], 3, False, "ms")
            for name in _MODELS
        ),
    ]
    failed = sum(sum(figures["errors"].values()) for figures in measured)
    rows = [
        [f"bare loop, batch {n}", results.number(rate), ""]
        for n, rate in summary["bare_images_per_s"].items()
    ]
    served = results.number(summary["gateway_images_per_s"])
    rows.append([f"gateway, c={_CLIENTS}", served, results.number(summary["gateway_p50_ms"])])
    text = "\n\n".join(
        [
            results.table(["ResNet-50", "images/s", "p50 ms"], rows),
            results.targets_table(targets),
            f"Failed requests: {failed}.",
        ]
    )
    body = {"settings": settings, "summary": summary, "rounds": measured}
    path = results.write("resnet", body, targets, text)
    print(f"\n{text}\n\nwritten to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
