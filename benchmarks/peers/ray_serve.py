"""The Ray Serve peer: a deployment with `@serve.batch`, as Ray Serve's own guide writes one.

    python -m benchmarks.peers.ray_serve mlp.onnx 18020 default

`default` sets nothing. `flags` sets Ray Serve's two switches for throughput: HAProxy in front of
replicas that listen for themselves, and user code on the replica's loop. `fastest` also gives
`@serve.batch` the gateway's own batching (up to 64 rows, no wait for batch-mates), lets all
requests in at once, and runs the workers at normal priority: the most that could be got out of it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_FLAGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # How long a replica lingers at shutdown; no request meets it.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}


@dataclass(frozen=True, slots=True)
class Mode:
    """Settings of `@serve.batch`, of `@serve.deployment`, and of the environment."""

    batch: Mapping[str, Any] = field(default_factory=dict)
    deployment: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


MODES = {
    "default": Mode(),
    "flags": Mode(environment=_FLAGS),
    "fastest": Mode(
        batch={"max_batch_size": 64, "batch_wait_timeout_s": 0},
        deployment={"max_ongoing_requests": 1000},
        environment={**_FLAGS, "RAY_worker_niceness": "0"},
    ),
}


def application(model: Path, mode: Mode) -> Any:
    """The bound Serve application. Ray must not have been imported with other settings before."""
    from ray import serve

    class Model:
        def __init__(self, path: str) -> None:
            from benchmarks.models import cpu_session

            self._session = cpu_session(Path(path))

        @serve.batch(**mode.batch)  # type: ignore[untyped-decorator]
        async def run(self, rows: list[Any]) -> list[Any]:
            return list(self._session.run(None, {"x": np.concatenate(rows)})[0])

        async def __call__(self, request: Any) -> dict[str, Any]:
            tensor = (await request.json())["inputs"][0]
            rows = np.asarray(tensor["data"], dtype=np.float32).reshape(tensor["shape"])
            row = await self.run(rows)
            output = {"name": "p", "datatype": "FP32", "shape": [1, len(row)], "data": row.tolist()}
            return {"model_name": "mlp", "model_version": "1", "outputs": [output]}

    return serve.deployment(**mode.deployment)(Model).bind(str(model.absolute()))


def main() -> None:
    """Deploy, then serve until SIGINT or SIGTERM."""
    model, port, mode = Path(sys.argv[1]), int(sys.argv[2]), MODES[sys.argv[3]]
    # Ray reads its environment when it is imported.
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", **mode.environment})
    import ray
    from ray import serve

    stop = threading.Event()
    # "local": never join a Ray that happens to run on this machine.
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level="ERROR",
    )
    try:
        # After ray.init, whose own handlers end the process without a shutdown.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(model, mode), route_prefix="/")
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
