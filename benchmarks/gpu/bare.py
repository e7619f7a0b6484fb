"""A bare loop over one model at each batch size, in a process of its own.

    python -m benchmarks.gpu.bare MODEL FILE SECONDS ANSWER [DEVICE]

Nothing but the replica's own backend, with inputs in this machine's memory and outputs back there,
so that both sides move the same bytes. Prints {batch size: {"rows_per_s", "run_ms"}} as JSON, and
writes the answer to the benchmark's request to the file ANSWER, in NumPy's form. Its memory on the
GPU is free again when it ends.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.gpu.subjects import SUBJECTS, Rows
from serving.replica.backends.base import Backend

_WARM_RUNS = 3


def main(name: str, file: str, seconds: str, answer: str, device: str = "cuda") -> None:
    """Measure and print."""
    subject = SUBJECTS[name]
    backend = subject.load(Path(file), device)
    sizes = subject.sizes()
    figures = {
        size: _loop(backend, subject.rows(size), float(seconds) / len(sizes)) for size in sizes
    }
    np.save(answer, backend.run([subject.rows(subject.request_rows)])[0])
    print(json.dumps(figures))


def _loop(backend: Backend, rows: Rows, seconds: float) -> dict[str, float]:
    for _ in range(_WARM_RUNS):
        backend.run([rows])
    runs: list[float] = []
    started = last = time.perf_counter()
    while last - started < seconds or not runs:
        backend.run([rows])
        now = time.perf_counter()
        runs.append(now - last)
        last = now
    return {
        "rows_per_s": len(rows) * len(runs) / (last - started),
        "run_ms": statistics.median(runs) * 1e3,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
