"""The whole way in one command: train, register, serve, post real digits, show what came back.

    python -m models.digits.demo        (or `make demo`)

State lives in a temporary directory; when it ends, nothing runs and nothing is left.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import psutil
import yaml
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table

from models.digits import train
from models.digits.data import DATASET_NAME, DATASET_URI, Images, Labels, load_digits
from models.processes import session
from serving.artifacts import EXPORT_PLATFORM, ONNX_PLATFORM
from serving.cli.client import Admin
from serving.cli.preflight import port_problem
from serving.config import load_config
from serving.errors import ClusterError, OperatorError

MODEL: Final = "digits"
CONFIG: Final = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
_RUNTIMES: Final = {ONNX_PLATFORM: "onnx", EXPORT_PLATFORM: "torch"}
_PASSES: Final = 4  # over the held-out digits, to each version
_CLIENTS: Final = 8  # connections to each version, so that batches form
_READY_S: Final = 150.0
_STOP_S: Final = 45.0
_REPORT_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Served:
    """What the clients saw of one version."""

    version: str
    requests: int
    correct: int
    failures: tuple[str, ...]


def main() -> int:
    """Run the demo; the exit status."""
    console = Console(stderr=False, highlight=False)
    started = time.monotonic()
    # Being asked to end is as good as Ctrl-C: both leave nothing running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="serving-demo-") as directory:
            with console.status("") as status:
                table, failures = _run(Path(directory), _Steps(console, status))
            console.print(table)
    except OperatorError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("demo: interrupted; everything it started is stopped", file=sys.stderr)
        return 130
    for failure in failures[:3]:
        print(f"demo: {failure}", file=sys.stderr)
    console.print(f"done in {time.monotonic() - started:.0f} s, nothing left running")
    return 1 if failures else 0


class _Steps:
    """Progress: a spinner on a terminal, and a line for each finished step everywhere."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console = console
        self._status = status
        self._since = time.monotonic()

    def now(self, text: str) -> None:
        """What happens at the moment."""
        self._status.update(text)

    def done(self, text: str) -> None:
        """A step is over."""
        now = time.monotonic()
        self._console.print(f"✓ {text} ({now - self._since:.0f} s)")
        self._since = now


def _run(directory: Path, steps: _Steps) -> tuple[Table, list[str]]:
    home = directory / "home"
    os.environ["SERVING_HOME"] = str(home)
    digits = load_digits()
    _train_and_register(directory, digits, steps)
    config = _config_with_free_ports(directory)
    steps.now("starting the gateway")
    with _gateway(config, directory / "gateway.log", steps) as (inference, admin):
        steps.done(f"gateway ready at {inference}")
        count = _PASSES * len(digits.test_images)
        steps.now(f"posting {count} held-out digits to each version")
        versions = ("1", "2")
        with ThreadPoolExecutor(len(versions)) as pool:
            served = list(
                pool.map(
                    lambda v: _post_all(inference, v, digits.test_images, digits.test_labels),
                    versions,
                )
            )
        steps.done(f"{sum(s.requests for s in served)} digits classified over HTTP")
        reported = _reported(Admin(admin), served)
        steps.now("stopping the gateway")
    steps.done("gateway stopped")
    return _table(served, reported), [failure for s in served for failure in s.failures]


def _train_and_register(directory: Path, digits: Any, steps: _Steps) -> None:
    """Version 1 (ONNX, @baseline) and version 2 (Torch, @champion), with what is known of them."""
    from serving.registry.mlflow import Registry
    from serving.replica.inspect import inspect_in_child

    config = load_config(CONFIG)
    config.home_dir.mkdir(parents=True, exist_ok=True)
    registry = Registry(config.registry_uri)
    dataset = (DATASET_NAME, DATASET_URI, digits.digest)
    for number, alias, what in ((1, "baseline", "softmax"), (2, "champion", "CNN")):
        work = directory / f"v{number}"
        work.mkdir()
        steps.now(f"training version {number} ({what})")
        trained = (
            train.train_softmax(digits, work)
            if number == 1
            else train.train_cnn(
                digits, work, lambda text: steps.now(f"training version 2: {text}")
            )
        )
        steps.done(
            f"version {number} trained: {what}, {trained.metrics['accuracy']:.1%} on held-out data"
        )
        steps.now(f"registering version {number}")
        bundle = directory / f"bundle{number}"
        inspect_in_child(trained.path, bundle, sample=trained.sample)
        version = registry.register(
            MODEL,
            bundle,
            metrics=trained.metrics,
            dataset=dataset,
            training_time=(trained.started_ms, trained.ended_ms),
            alias=alias,
        )
        steps.done(f"version {version.version} registered as @{alias}, {version.digest[:19]}…")


def _config_with_free_ports(directory: Path) -> Path:
    """configs/demo.yaml, or a copy of it with other ports where its own are taken."""
    config = load_config(CONFIG)
    addresses = {
        "gateway": (config.gateway.host, config.gateway.port),
        "control": (config.control.host, config.control.port),
    }
    taken = [name for name, address in addresses.items() if port_problem(name, *address)]
    if not taken:
        return CONFIG
    raw = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for name in taken:
        raw[name] = {**raw.get(name, {}), "port": 0}
    copy = directory / "demo.yaml"
    copy.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return copy


@contextlib.contextmanager
def _gateway(config: Path, log: Path, steps: _Steps) -> Iterator[tuple[str, str]]:
    """`serving up` as a child: its inference and admin URLs once ready; stopped at the end."""
    command = [str(Path(sys.executable).with_name("serving")), "up", "-f", str(config)]
    with log.open("wb") as errors:
        # A session of its own: Ctrl-C reaches the demo alone, which then stops it in order.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield _ready_urls(process, log, steps)
    finally:
        _stop(process)


def _ready_urls(process: subprocess.Popen[str], log: Path, steps: _Steps) -> tuple[str, str]:
    assert process.stdout is not None
    ready = threading.Event()
    # Reading blocks: past the deadline the gateway is killed, which ends the reading.
    watchdog = threading.Timer(_READY_S, lambda: None if ready.is_set() else process.kill())
    watchdog.daemon = True
    watchdog.start()
    try:
        for line in process.stdout:
            steps.now(f"gateway: {line.strip()}")
            if line.startswith("ready: "):
                ready.set()
                words = line.split()
                urls = dict(zip(words[1::2], words[2::2], strict=True))
                # Whatever it says from now on must not fill the pipe.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                return urls["inference"], urls["admin"]
    finally:
        watchdog.cancel()
    process.wait()
    told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = told[-1].removeprefix("error: ") if told else f"exit status {process.returncode}"
    raise ClusterError(f"the gateway did not become ready: {reason}")


def _stop(process: subprocess.Popen[str]) -> None:
    """Interrupt the gateway and wait; end what is left of its processes, and say so."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(_STOP_S)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"the gateway did not stop within {_STOP_S:.0f} s; killed") from error
    finally:
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(session(process.pid), timeout=5)
        for survivor in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
    if left:
        raise ClusterError(f"the gateway left {len(left)} processes behind; killed")


def _post_all(url: str, version: str, images: Images, labels: Labels) -> Served:
    """Every image `_PASSES` times over `_CLIENTS` connections, one image a request."""
    work = list(islice(cycle(zip(images, labels, strict=True)), _PASSES * len(images)))
    with ThreadPoolExecutor(_CLIENTS) as pool:
        parts = pool.map(
            lambda share: _post_share(url, version, share),
            [work[i::_CLIENTS] for i in range(_CLIENTS)],
        )
        answers = [answer for part in parts for answer in part]
    failures = tuple(a for a in answers if isinstance(a, str))
    return Served(version, len(answers), sum(a is True for a in answers), failures)


def _post_share(url: str, version: str, share: Sequence[tuple[Any, Any]]) -> list[bool | str]:
    """Each answer: whether the most probable class is the label, or what went wrong."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    path = f"/v2/models/{MODEL}/versions/{version}/infer"
    answers: list[bool | str] = []
    with contextlib.closing(connection):
        for image, label in share:
            tensor = {"name": train.INPUT, "shape": [1, image.size], "datatype": "FP32"}
            body = json.dumps({"inputs": [{**tensor, "data": image.tolist()}]})
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                text = reply.read()
            except OSError as error:
                answers.append(f"version {version}: {error}")
                connection.close()
                continue
            if reply.status != http.client.OK:
                answers.append(f"version {version}: HTTP {reply.status} {text.decode()[:200]}")
                continue
            probabilities = json.loads(text)["outputs"][0]["data"]
            answers.append(bool(np.argmax(probabilities) == label))
    return answers


def _reported(admin: Admin, served: Sequence[Served]) -> dict[str, dict[str, Any]]:
    """The versions as the controller knows them, once the gateway's last report has arrived."""
    deadline = time.monotonic() + _REPORT_S
    while True:
        model = next(m for m in admin.status()["models"] if m["name"] == MODEL)
        versions: dict[str, dict[str, Any]] = {v["version"]: v for v in model["versions"]}
        if all(versions[s.version]["requests"] >= s.requests for s in served):
            return versions
        if time.monotonic() > deadline:
            counted = {s.version: versions[s.version]["requests"] for s in served}
            raise ClusterError(f"the controller counts too few requests: {counted}")
        time.sleep(0.2)


def _table(served: Sequence[Served], reported: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption="accuracy on what was served; latency by the gateway; batch: mean rows",
    )
    for name in ("version", "digest", "runtime", "device"):
        table.add_column(name)
    for name in ("requests", "accuracy", "p50 ms", "p99 ms", "batch"):
        table.add_column(name, justify="right")
    for s in served:
        info = reported[s.version]
        table.add_row(
            s.version,
            info["digest"].removeprefix("sha256:")[:8],
            _RUNTIMES.get(info["platform"], info["platform"]),
            info["device"],
            f"{s.requests:,}",
            f"{s.correct / s.requests:.1%}",
            f"{info['p50_s'] * 1e3:.2f}",
            f"{info['p99_s'] * 1e3:.2f}",
            f"{info['mean_batch']:.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
