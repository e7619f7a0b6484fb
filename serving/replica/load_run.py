"""A child process that loads one model and measures it under load: JSON lines in, JSON lines out.

The first line says what to load, each further one what to measure; the end of the input ends it.
Requests come as from a gateway: a few connections, each of which takes what waits, up to the
largest batch, and the engine merges what waits behind a run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.artifacts import SAMPLE_FILE
from serving.core.types import Batch
from serving.errors import ServingError
from serving.replica.backends.base import Array, Backend, RuntimeOptions, load_backend, one_line
from serving.replica.backends.cuda import identity
from serving.replica.engine import Engine
from serving.replica.golden import check_golden, load_arrays, resized, warm_up
from serving.replica.rules import rules_for
from serving.replica.work import Work

_CONNECTIONS: Final = 2
_WARM_SHARE: Final = 0.2
_MAX_LATENCIES: Final = 20_000
_PR_SET_PDEATHSIG: Final = 1


class Clients:
    """Callers who each send a request of one row, wait for its answer and send the next."""

    def __init__(self, engine: Engine, rows: list[Array], count: int) -> None:
        """`rows` are inputs of at least the engine's largest batch."""
        self._engine, self._rows = engine, rows
        self._merges = engine.backend.signature.batch is not Batch.NONE
        self._mutex = threading.Condition()
        self._waiting: deque[float] = deque()
        self._count = count
        self._until = self._counts_from = 0.0
        self._error: ServingError | None = None
        self.latencies: list[float] = []
        self.run_rows = 0

    def run(self, seconds: float) -> float:
        """Let them, for so long and until each has an answer; the seconds that were counted.

        Raises `ServingError` if the model fails.
        """
        started = time.monotonic()
        self._counts_from = started + _WARM_SHARE * seconds
        self._until = self._counts_from + seconds
        self._waiting.extend([started] * self._count)
        threads = [threading.Thread(target=self._connection) for _ in range(_CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return time.monotonic() - self._counts_from

    def _connection(self) -> None:
        most = self._engine.rules.merge_size
        while taken := self._take(most):
            n = len(taken)
            inputs = [a[:n] for a in self._rows] if self._merges else self._rows
            work = Work(inputs, n, arrived=time.monotonic())
            self._engine.submit(work)
            self._give_back(taken, work)

    def _take(self, most: int) -> list[float]:
        """When each of the requests that wait was sent; none at the end."""
        with self._mutex:
            while not self._waiting and not self._over():
                self._mutex.wait(0.1)
            if self._over():
                return []
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def _over(self) -> bool:
        late = time.monotonic() >= self._until and len(self.latencies) >= self._count
        return late or self._error is not None

    def _give_back(self, taken: list[float], work: Work) -> None:
        now = time.monotonic()
        with self._mutex:
            self._error = self._error or work.error
            counted = [now - sent for sent in taken] if now >= self._counts_from else []
            self.latencies += counted
            self.run_rows += work.run_rows * len(counted)
            self._waiting.extend([now] * len(taken))
            self._mutex.notify_all()


class Bench:
    """One loaded model with an engine for each largest batch."""

    def __init__(self, backend: Backend, bundle: Path, buckets: tuple[int, ...] | None) -> None:
        self.backend = backend
        self._bundle = bundle
        self._buckets = buckets
        self._sample = load_arrays(bundle / SAMPLE_FILE, backend.signature.inputs)
        self._engines: dict[int, Engine] = {}

    def measure(self, max_size: int, concurrency: int, seconds: float) -> dict[str, Any]:
        """Raises `ServingError` if the model fails, or not gives what it should."""
        engine = self._engine(max_size)
        merges = self.backend.signature.batch is not Batch.NONE
        rows = resized(self._sample, engine.rules.merge_size) if merges else self._sample
        clients = Clients(engine, rows, concurrency)
        elapsed = clients.run(seconds)
        count = len(clients.latencies)
        kept = np.sort(np.array(clients.latencies))[:: max(1, count // _MAX_LATENCIES)]
        return {
            "requests": count,
            "seconds": elapsed,
            "run_rows": clients.run_rows,
            "latencies": [round(float(s), 7) for s in kept],
        }

    def _engine(self, max_size: int) -> Engine:
        if max_size not in self._engines:
            buckets = self._buckets
            if buckets is not None:
                buckets = (*(b for b in buckets if b < max_size), max_size)
            engine = Engine(self.backend, rules_for(self.backend, max_size, buckets))
            warm_up(engine, self._sample)
            check_golden(engine, self._bundle)
            self._engines[max_size] = engine
        return self._engines[max_size]


def _load(asked: Mapping[str, Any]) -> Bench:
    bundle = Path(asked["bundle"])
    options = RuntimeOptions(asked["device"], asked["onnx"], asked["torch"])
    buckets = asked["buckets"]
    bench = Bench(load_backend(bundle, options), bundle, None if buckets is None else (*buckets,))
    # Also what its golden outputs say of this precision.
    bench.measure(asked["max_size"], 1, 0.0)
    return bench


def _die_with(parent: int) -> None:
    """Let this process end with its parent, also in the middle of a run (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> int:
    """The process; its argument is the number of its parent. Gives the exit status."""
    _die_with(int(sys.argv[1]))
    # Runtimes and models print to stdout; the answers must be alone there.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    bench: Bench | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if bench is None:
                bench = _load(asked)
                device = bench.backend.device
                found: dict[str, Any] = {"device": device if device == "cpu" else identity().name}
            else:
                found = bench.measure(**asked)
        except ServingError as error:
            found = {"error": str(error)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {one_line(error)}"}
        answers.write(json.dumps(found) + "\n")
        if bench is None:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
