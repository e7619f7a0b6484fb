"""Runs a greedy model until memory runs out, and prints what became of it.

`python -m tests.gpu.memory_child torch|onnx ROW_BYTES LIMIT_BYTES ROWS` (a limit of 0: none)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from serving.replica.engine import Engine
from serving.replica.rules import rules_for
from serving.replica.work import Work
from tests.gpu import greedy, reading


def main(runtime: str, row_bytes: int, limit: int, rows: int) -> None:
    gpu = reading.Device()
    with tempfile.TemporaryDirectory() as directory:
        backend = greedy.load(runtime, Path(directory), row_bytes, limit or None)
    engine = Engine(backend, rules_for(backend, rows))
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    # The second one knows better from the start.
    for _ in range(2):
        work = Work([x], rows, arrived=0.0)
        engine.submit(work)
        assert work.error is None, work.error
        np.testing.assert_array_equal(work.outputs[0], x * 2)
    backend.check()
    meter = backend.meter
    assert meter is not None
    print(
        json.dumps(
            {
                "ceiling": engine.ceiling,
                "oom_batches": engine.oom_batches,
                "held_bytes": meter.held_bytes(),
                "context_bytes": meter.context_bytes,
                "nvml_bytes": gpu.grown_bytes(),
                "nvml_knows_it": gpu.knows_this_process(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
