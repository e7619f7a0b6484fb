"""Replicas follow the load of a real deployment, down to none, and no request fails on the way."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from tests.e2e.deployment import Deployment, eventually
from tests.e2e.load import Load

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

INFER = "/v2/models/sleeper/infer"
# A run takes some milliseconds, and has the replica to itself.
MODEL: dict[str, Any] = {
    "version": "1",
    "batching": {"max_size": 1},
    "scaling": {
        "min": 0,
        "max": 2,
        "target_queue_delay": "500ms",
        "target_utilization": 0.4,
        "scale_down_after": "3s",
        "idle_to_zero_after": "2s",
    },
}


def body(turns: float) -> dict[str, Any]:
    data = [1000.0 + turns, 1.0, 1.0, 1.0]
    return {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": data}]}


def version(deployment: Deployment) -> Any:
    return next(m for m in deployment.status()["models"] if m["name"] == "sleeper")["versions"][0]


def becomes(deployment: Deployment, state: str, wanted: int) -> Any:
    def reached() -> Any:
        found = version(deployment)
        return found if (found["state"], found["wanted"]) == (state, wanted) else None

    return eventually(reached, f"{wanted} replicas, {state}: {version(deployment)}", 90)


def is_ready(deployment: Deployment) -> bool:
    url = f"http://127.0.0.1:{deployment.port}/v2/models/sleeper/ready"
    with urllib.request.urlopen(url, timeout=10) as reply:
        return bool(json.loads(reply.read())["ready"])


def test_replicas_follow_the_load_down_to_none(deployment: Deployment) -> None:
    mlp = deployment.config["models"]["mlp"]
    done = deployment.apply({"mlp": mlp, "sleeper": MODEL})
    assert done.returncode == 0, done.stderr
    try:
        asleep = becomes(deployment, "asleep", 0)
        assert asleep["scaling"]["reason"].startswith("asleep")
        eventually(lambda: not version(deployment)["replicas"], "the replica has left")
        assert is_ready(deployment), "a request would be answered"
        app = asleep["app"]

        with Load(deployment.port, INFER, [body(0)], connections=4) as waking:
            waking.wait_for(4)
        assert not waking.failed, waking.failures
        assert not waking.broken

        with Load(deployment.port, INFER, [body(100_000)], connections=2) as heavy:
            scaled = becomes(deployment, "ready", 2)
        assert not heavy.failed, heavy.failures
        assert not heavy.broken
        assert scaled["app"] == app, "no other application"
        assert len(scaled["replicas"]) == 2

        with Load(deployment.port, INFER, [body(0)], connections=2, pause_s=0.02) as light:
            becomes(deployment, "ready", 1)
            light.wait_for(light.count + 20)
        assert not light.failed, light.failures
        assert not light.broken

        entries = deployment.get(deployment.control_port, "/v1/audit?subject=sleeper&limit=20")
        steps = [(e["body"]["from"], e["body"]["to"]) for e in entries["entries"]]
        assert {(1, 0), (0, 1), (1, 2), (2, 1)} <= set(steps)
    finally:
        assert deployment.apply({"mlp": mlp}).returncode == 0
