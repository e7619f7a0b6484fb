"""Warms a model of the zoo up as a replica does, and prints its profile beside NVML's reading.

`python -m tests.gpu.profile_child resnet50|transformer LIMIT_BYTES` (a limit of 0: none)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from serving.replica.backends.base import RuntimeOptions, load_model
from serving.replica.engine import Engine
from serving.replica.profiling import profiled_warm_up
from serving.replica.rules import rules_for
from tests.gpu import reading, zoo


def main(name: str, limit: int) -> None:
    gpu = reading.Device()
    with tempfile.TemporaryDirectory() as directory:
        path, platform, signature = zoo.build(name, Path(directory))
        options = RuntimeOptions("cuda", memory_limit_bytes=limit or None)
        backend = load_model(path, platform, options, signature)
    engine = Engine(backend, rules_for(backend, 64))
    profile = profiled_warm_up(engine, zoo.inputs(name, 1))
    assert profile is not None
    print(
        json.dumps(
            {
                "profile": profile.to_dict(),
                "need_bytes": profile.need(64),
                "nvml_bytes": gpu.grown_bytes(),
                "nvml_knows_it": gpu.knows_this_process(),
                "ceiling": engine.ceiling,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
