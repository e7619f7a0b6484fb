"""Measures one model version on the device at hand: each instance is a child process.

What is measured is the replica's part, from a batch that arrives to its answer. HTTP and the
gateway come on top of it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.core.tuning import (
    AS_EXPORTED,
    PERCENTILES,
    Measurement,
    Setting,
    settings,
    usd_per_million,
)
from serving.errors import ArtifactError

_LOAD_TIMEOUT_S: Final = 600.0
_LEAST_S, _MOST_S = 0.1, 5.0
"""How long one setting is measured."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Space:
    """What is tried. `precisions` are torch dtypes or `AS_EXPORTED`; sizes and counts ascend."""

    bundle: Path
    device: str
    onnx: Mapping[str, Any]
    torch: Mapping[str, Any]
    buckets: tuple[int, ...] | None
    precisions: tuple[str, ...]
    max_sizes: tuple[int, ...]
    instances: tuple[int, ...]


@dataclass(slots=True)
class Tuned:
    """What was measured, on which device, and what could not be, a sentence each."""

    device: str = ""
    found: list[Measurement] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def tune(
    space: Space, budget_s: float, usd_per_hour: Callable[[str, int], float | None], say: Say
) -> Tuned:
    """Measure every setting of `space` in about `budget_s` seconds, loading not counted.

    `usd_per_hour` gives the price of a number of instances on a device. Raises `ArtifactError` if
    nothing could be measured.
    """
    plans = {p: list(settings(p, space.max_sizes, space.instances)) for p in space.precisions}
    tuned = Tuned()
    each_s = budget_s / sum(len(plan) for plan in plans.values())
    each_s = min(max(each_s, _LEAST_S), _MOST_S)
    for precision, plan in plans.items():
        say(f"loading {_times(space.instances[-1])}, precision {precision}")
        with _instances(space, precision, tuned) as running:
            for setting in plan:
                if setting.instances <= len(running):
                    _measure(setting, running, each_s, usd_per_hour, tuned, say)
    if not tuned.found:
        raise ArtifactError(f"nothing could be measured: {'; '.join(tuned.left_out)}")
    return tuned


def _measure(
    setting: Setting,
    running: Sequence[_Instance],
    seconds: float,
    usd_per_hour: Callable[[str, int], float | None],
    tuned: Tuned,
    say: Say,
) -> None:
    used = running[: setting.instances]
    shares = [
        setting.concurrency // len(used) + (i < setting.concurrency % len(used))
        for i in range(len(used))
    ]
    try:
        asked = [(r, share) for r, share in zip(used, shares, strict=True) if share]
        for instance, share in asked:
            instance.ask(max_size=setting.max_size, concurrency=share, seconds=seconds)
        answers = [instance.answer(_LOAD_TIMEOUT_S) for instance, _ in asked]
    except ArtifactError as error:
        tuned.left_out.append(f"{_named(setting)}: {error}")
        return
    throughput = sum(a["requests"] / a["seconds"] for a in answers)
    pooled, weights = _pooled(answers)
    requests = sum(a["requests"] for a in answers)
    price = usd_per_hour(tuned.device, setting.instances)
    latency = {name: _quantile(pooled, weights, float(name[1:]) / 100) for name in PERCENTILES}
    tuned.found.append(
        Measurement(
            setting,
            throughput,
            latency,
            sum(a["run_rows"] for a in answers) / requests,
            requests,
            usd_per_million(price, throughput),
        )
    )
    say(f"{_named(setting)}: {throughput:,.0f}/s, p99 {1e3 * latency['p99']:.3g} ms")


def _pooled(answers: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """All latencies, sorted, and of each how many requests it stands for."""
    values = np.concatenate([np.array(a["latencies"]) for a in answers])
    weights = np.concatenate(
        [np.full(len(a["latencies"]), a["requests"] / len(a["latencies"])) for a in answers]
    )
    order = values.argsort()
    return values[order], weights[order]


def _quantile(values: Any, weights: Any, q: float) -> float:
    reached = np.searchsorted(weights.cumsum(), q * weights.sum())
    return float(values[min(int(reached), len(values) - 1)])


class _Instance:
    """One child process with the model loaded."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.replica.load_run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )

    def ask(self, **asked: Any) -> None:
        """Send one command; whether it arrived is seen by the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(asked) + "\n")

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next answer. Raises `ArtifactError` with what the child says, or that it died."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(timeout_s, self._process.kill)
        watchdog.start()
        started = time.monotonic()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            status = self._process.wait()
            late = time.monotonic() - started >= timeout_s
            why = f"took longer than {timeout_s:g} s" if late else f"ended with status {status}"
            raise ArtifactError(f"the process of an instance {why}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ArtifactError(found["error"])
        return found

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def _instances(space: Space, precision: str, tuned: Tuned) -> Iterator[list[_Instance]]:
    """As many as load, of as many as are wanted."""
    torch = space.torch if precision == AS_EXPORTED else {**space.torch, "dtype": precision}
    started: list[_Instance] = []
    running: list[_Instance] = []
    try:
        for _ in range(space.instances[-1]):
            instance = _Instance()
            started.append(instance)
            instance.ask(
                bundle=str(space.bundle),
                device=space.device,
                onnx=dict(space.onnx),
                torch=dict(torch),
                buckets=space.buckets,
                max_size=space.max_sizes[-1],
            )
            try:
                tuned.device = instance.answer(_LOAD_TIMEOUT_S)["device"]
            except ArtifactError as error:
                number = len(running) + 1
                tuned.left_out.append(f"{precision}, {_times(number)}: {error}")
                break
            running.append(instance)
        yield running
    finally:
        for instance in started:
            instance.end()


def _times(count: int) -> str:
    return "1 instance" if count == 1 else f"{count} instances"


def _named(setting: Setting) -> str:
    return (
        f"{setting.precision}, {_times(setting.instances)}, max_size {setting.max_size}, "
        f"{setting.concurrency} in flight"
    )
