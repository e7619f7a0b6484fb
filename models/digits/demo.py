"""The whole way in one command: train, register, serve, ship a better version, catch a bad one.

    python -m models.digits.demo        (or `make demo`)

State lives in a temporary directory; when it ends, nothing runs and nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import yaml
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table

from models.digits import train
from models.digits.data import DATASET_NAME, DATASET_URI, Digits, load_digits
from models.digits.traffic import Traffic
from models.processes import session
from serving.artifacts import EXPORT_PLATFORM, ONNX_PLATFORM
from serving.cli.client import Admin
from serving.cli.preflight import port_problem
from serving.config import load_config
from serving.errors import ClusterError, OperatorError

MODEL: Final = "digits"
CONFIG: Final = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
_RUNTIMES: Final = {ONNX_PLATFORM: "onnx", EXPORT_PLATFORM: "torch"}
_READY_S: Final = 150.0
_STOP_S: Final = 45.0
_ROLLOUT_S: Final = 150.0
_ENDED: Final = frozenset({"succeeded", "rolled_back", "rollback_failed"})
# Version, alias, what it is, and how it is trained.
_VERSIONS: Final = (
    ("champion", "softmax regression", train.train_softmax),
    ("challenger", "CNN", train.train_cnn),
    ("mistake", "softmax regression on wrong labels", train.train_mislabelled),
)


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
        self._console.print(f"✓ {text} ({now - self._since:.0f} s)", soft_wrap=True)
        self._since = now

    def say(self, text: str) -> None:
        """A detail of the last step."""
        self._console.print(text, soft_wrap=True)


def _run(directory: Path, steps: _Steps) -> tuple[Table, list[str]]:
    os.environ["SERVING_HOME"] = str(directory / "home")
    digits = load_digits()
    _train_and_register(directory, digits, steps)
    config = _config_with_free_ports(directory)
    steps.now("starting the gateway")
    with _gateway(config, directory / "gateway.log", steps) as (inference, url):
        steps.done(f"version 1 serves at {inference}")
        admin = Admin(url)
        with Traffic(inference, url, MODEL, digits.test_images, digits.test_labels) as traffic:
            failures = _roll_out(admin, "2", "succeeded", steps)
            measured = _measured(admin)
            failures += _roll_out(admin, "3", "rolled_back", steps)
        table = _table({**measured, **_measured(admin)}, traffic)
        steps.now("stopping the gateway")
    steps.done("gateway stopped")
    return table, failures + traffic.failures


def _train_and_register(directory: Path, digits: Digits, steps: _Steps) -> None:
    """Three versions, with what is known of them. The third is a mistake."""
    from serving.registry.mlflow import Registry
    from serving.replica.inspect import inspect_in_child

    config = load_config(CONFIG)
    config.home_dir.mkdir(parents=True, exist_ok=True)
    registry = Registry(config.registry_uri)
    for number, (alias, what, train_it) in enumerate(_VERSIONS, start=1):
        work = directory / f"v{number}"
        work.mkdir()
        steps.now(f"training version {number} ({what})")
        trained = train_it(digits, work)
        bundle = directory / f"bundle{number}"
        inspect_in_child(trained.path, bundle, sample=trained.sample)
        version = registry.register(
            MODEL,
            bundle,
            metrics=trained.metrics,
            dataset=(DATASET_NAME, DATASET_URI, digits.digest),
            training_time=(trained.started_ms, trained.ended_ms),
            alias=alias,
        )
        steps.done(
            f"version {version.version} trained and registered as @{alias}: {what}, "
            f"{trained.metrics['accuracy']:.1%} on held-out data, {version.digest[:19]}…"
        )


def _roll_out(admin: Admin, version: str, wanted: str, steps: _Steps) -> list[str]:
    """Ship a version under live traffic and tell its story; gives what went wrong."""
    started = admin.start_rollout(
        {"model": MODEL, "to": version, "actor": "demo", "reason": "a newer version"}
    )
    rollout, told = started, ""
    deadline = time.monotonic() + _ROLLOUT_S
    while rollout["state"] not in _ENDED and time.monotonic() < deadline:
        steps.now(f"version {version}: {rollout['next']}")
        chapter = f"{rollout['state'].replace('_', ' ')} at {rollout['weight']:.0%} of traffic"
        if chapter != told and told:
            steps.done(f"version {version}: {told}")
        told = chapter
        time.sleep(0.2)
        rollout = admin.rollout(started["id"])
    steps.done(f"version {version}: {rollout['state'].replace('_', ' ')}: {rollout['reason']}")
    for verdict in rollout["verdicts"]:
        if verdict["verdict"] == "fail" or wanted == "succeeded" == verdict["verdict"]:
            steps.say(f"    {verdict['sentence']}")
    if rollout["state"] == wanted:
        return []
    return [f"version {version}: {rollout['state']}, expected {wanted}: {rollout['reason']}"]


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


def _measured(admin: Admin) -> dict[str, dict[str, Any]]:
    """What the controller knows of the versions that run, by version."""
    model = next(m for m in admin.status()["models"] if m["name"] == MODEL)
    return {v["version"]: v for v in model["versions"]}


def _table(known: dict[str, dict[str, Any]], traffic: Traffic) -> Table:
    """What clients saw of each version that answered them, and how the gateway measured it."""
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
    for version, answers in sorted(traffic.answers.items()):
        info = known.get(version)
        if info is None:
            # It was taken back, and is gone.
            table.add_row(version, *["–"] * 3, f"{answers:,}", *["–"] * 4)
            continue
        table.add_row(
            version,
            info["digest"].removeprefix("sha256:")[:8],
            _RUNTIMES.get(info["platform"], info["platform"]),
            info["device"],
            f"{answers:,}",
            f"{traffic.right[version] / answers:.1%}",
            f"{info['p50_s'] * 1e3:.2f}",
            f"{info['p99_s'] * 1e3:.2f}",
            f"{info['mean_batch']:.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
