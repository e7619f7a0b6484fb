"""Measures one model version on the device at hand: each instance is a child process.

What is measured is the replica's part, from a batch that arrives to its answer. HTTP and the
gateway come on top of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

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

_COMMAND: Final = (sys.executable, "-m", "serving.replica.load_run")
_LOAD_TIMEOUT_S: Final = 600.0
_END_TIMEOUT_S: Final = 10.0
_LOOK_S: Final = 0.2
"""How often to look whether a child that does not answer is alive."""
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
        with _ended_in_order(), _instances(space, precision, tuned) as running:
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
    asked = [(r, share) for r, share in zip(used, shares, strict=True) if share]
    for instance, share in asked:
        instance.ask(max_size=setting.max_size, concurrency=share, seconds=seconds)
    answers: list[dict[str, Any]] = []
    errors: list[ArtifactError] = []
    # An answer that is not read here would be taken for that of the next setting.
    for instance, _ in asked:
        try:
            answers.append(instance.answer(_LOAD_TIMEOUT_S))
        except ArtifactError as error:
            errors.append(error)
    if errors:
        tuned.left_out.append(f"{_named(setting)}: {errors[0]}")
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
    """One child process with the model loaded, and whatever processes that starts."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*_COMMAND, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._read = b""
        self._killed = False

    def ask(self, **asked: Any) -> None:
        """Send one command; whether it arrived is seen by the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next answer. Raises `ArtifactError` with what the child says, or that it died."""
        deadline = time.monotonic() + timeout_s
        line = self._line(deadline)
        if line is None:
            late = time.monotonic() >= deadline
            status = None if late else self._status()
            self._kill()
            why = f"took longer than {timeout_s:g} s" if late else f"ended with status {status}"
            raise ArtifactError(f"the process of an instance {why}")
        try:
            found: dict[str, Any] = dict(json.loads(line))
        except (ValueError, TypeError):
            self._kill()
            raise ArtifactError("the process of an instance gave no proper answer") from None
        if "error" in found:
            raise ArtifactError(found["error"])
        return found

    def end(self) -> None:
        """End it, whatever it does."""
        self._kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _line(self, deadline: float) -> bytes | None:
        """The next whole line; none if it died or is late.

        The end of the pipe alone does not tell: a process that the child started may have it too.
        """
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        while b"\n" not in self._read:
            # Before the look at the pipe, which then has all that it wrote.
            died = self._process.poll() is not None
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            if poller.poll(0 if died else 1e3 * min(left_s, _LOOK_S)):
                more = os.read(pipe, 1 << 16)
                if not more:
                    return None
                self._read += more
            elif died:
                return None
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _status(self) -> int | None:
        """Its exit status; none if it closed its output and goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_END_TIMEOUT_S)
        return None

    def _kill(self) -> None:
        """Kill its group, once: later the number may be that of another."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit`, so that the children are ended.

    Only where they would have ended the process, and in the main thread.
    """
    replaced: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit)
                replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


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
