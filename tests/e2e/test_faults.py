"""Processes are killed under load; no client notices.

One deployment for all: each test begins when all that the last one killed is there again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deployment import Deployment, eventually
from tests.e2e.load import Load

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(280)]

MLP = "/v2/models/mlp/infer"
SIMPLE = "/v2/models/simple/infer"
AT_ONCE = {"version": "1", "rollout": "immediate"}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {**AT_ONCE, "replicas": 2},
    # Only one test asks it, and counts.
    "simple": AT_ONCE,
    "sleeper": {**AT_ONCE, "stall_timeout_s": 3.0, "timeout_ms": 1000},
}


@pytest.fixture(scope="module")
def site(registered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("faults")
    shutil.copy(registered / "registry.db", home)
    with Deployment(home, MODELS) as running:
        yield running


@pytest.fixture
def deployment(site: Deployment) -> Deployment:
    """The site as it was in the beginning."""
    if site.config["models"] != MODELS:
        applied = site.apply(MODELS)
        assert applied.returncode == 0, applied.stderr
    eventually(lambda: whole(site), "everything is there")
    return site


def whole(site: Deployment) -> bool:
    try:
        gateways = site.status()["gateways"]
        serving = {name: replicas(site, name) for name in MODELS}
    except OSError:
        return False
    pids = [r["pid"] for r in [*gateways, *(r for found in serving.values() for r in found)]]
    return (
        len(gateways) == 1
        and all(len(serving[name]) == m.get("replicas", 1) for name, m in MODELS.items())
        and all(map(alive, pids))
    )


def mlp_body(rows: int) -> dict[str, Any]:
    values = [(i % 17) / 17 for i in range(64 * rows)]
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 64], "data": values}
    return {"inputs": [tensor]}


def simple_body() -> dict[str, Any]:
    values = list(range(16))
    tensor = {"datatype": "INT32", "shape": [1, 16], "data": values}
    return {"inputs": [{"name": name, **tensor} for name in ("INPUT0", "INPUT1")]}


def replicas(deployment: Deployment, model: str) -> list[dict[str, Any]]:
    """The replicas of a model that are ready and heard of lately."""
    found = [m for m in deployment.status()["models"] if m["name"] == model]
    return [r for m in found for v in m["versions"] for r in v["replicas"] if r["state"] == "ready"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def simple_answered(deployment: Deployment) -> float:
    """The counter, 0 before there is one; a controller that has just restarted has none yet."""
    try:
        text = deployment.metrics()
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
        return 0.0
    for line in text.splitlines():
        if line.startswith("serving_requests_total{") and all(
            label in line for label in ('model="simple"', 'outcome="success"')
        ):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def test_killed_replicas_cost_no_request(deployment: Deployment) -> None:
    with Load(deployment.port, MLP, [mlp_body(1), mlp_body(3)], pause_s=0.002) as load:
        killed: set[int] = set()
        while len(killed) < 5 or load.count < 20_000:
            before = load.count
            ready = eventually(
                lambda: (
                    [r for r in replicas(deployment, "mlp") if r["pid"] not in killed]
                    if len(replicas(deployment, "mlp")) >= 2
                    else None
                ),
                "two replicas ready",
            )
            victim = ready[len(killed) % len(ready)]["pid"]
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
            load.wait_for(before + 3_000)
    assert load.failed == {}, load.failures
    assert load.broken == []
    assert load.wrong == []
    assert load.count >= 20_000


def test_killed_controller_costs_no_request_and_no_count(deployment: Deployment) -> None:
    assert simple_answered(deployment) == 0
    with Load(deployment.port, SIMPLE, [simple_body()], pause_s=0.002) as load:
        for round_number in range(1, 4):
            load.wait_for(3_000 * round_number)
            counted = eventually(lambda: simple_answered(deployment), "counts are reported")
            first = deployment.status()["controller"]["pid"]
            os.kill(first, signal.SIGKILL)

            def restarted(first: int = first) -> bool:
                try:
                    return bool(deployment.status()["controller"]["pid"] != first)
                except (OSError, urllib.error.HTTPError):
                    return False

            eventually(restarted, "the controller is back")
            back = eventually(lambda: simple_answered(deployment), "the counts are back", 10)
            assert back >= counted, "counts were lost"
        answered = load.count
        eventually(lambda: simple_answered(deployment) >= answered, "all answers are counted")
        table = deployment.get(deployment.control_port, "/v1/routes")
        assert {m["name"]: len(m["arms"][0]["endpoints"]) for m in table["models"]} == {
            name: model.get("replicas", 1) for name, model in MODELS.items()
        }
    assert load.failed == {}, load.failures
    assert load.broken == []
    assert load.wrong == []


def test_controller_and_replica_killed_together(deployment: Deployment) -> None:
    with Load(deployment.port, MLP, [mlp_body(1)], pause_s=0.002) as load:
        load.wait_for(500)
        old = {r["pid"] for r in replicas(deployment, "mlp")}
        os.kill(deployment.status()["controller"]["pid"], signal.SIGKILL)
        os.kill(min(old), signal.SIGKILL)

        def recovered() -> bool:
            try:
                pids = {r["pid"] for r in replicas(deployment, "mlp")}
            except (OSError, urllib.error.HTTPError):
                return False
            return len(pids) == 2 and min(old) not in pids

        eventually(recovered, "two replicas again")
        load.wait_for(load.count + 500)
    assert load.failed == {}, load.failures
    assert load.broken == []
    assert load.wrong == []


def test_a_hung_replica_is_replaced_and_its_callers_get_504(deployment: Deployment) -> None:
    hung = replicas(deployment, "sleeper")[0]["pid"]
    started = time.monotonic()
    status, body = post(deployment.port, "sleeper", 2e6)
    assert status == 504, body
    assert 0.9 < time.monotonic() - started < 2.0
    assert "no answer within 1000 ms" in body["error"]
    eventually(lambda: not alive(hung), "the hung replica has ended")

    def answers() -> bool:
        status, body = post(deployment.port, "sleeper", 3.0)
        return status == 200 and body["outputs"][0]["data"] == [6.0] * 4

    eventually(answers, "a new replica answers")
    assert replicas(deployment, "sleeper")[0]["pid"] != hung


def test_a_stopped_replica_is_left_out(deployment: Deployment) -> None:
    """SIGSTOP: its sockets stay open, so only the heartbeats tell."""
    with Load(deployment.port, MLP, [mlp_body(1)], pause_s=0.002) as load:
        load.wait_for(500)
        stopped = replicas(deployment, "mlp")[0]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        try:
            load.wait_for(load.count + 5_000)
        finally:
            os.kill(stopped, signal.SIGKILL)
    assert load.failed == {}, load.failures
    assert load.broken == []
    assert load.wrong == []
    assert load.slowest_s < 10


def test_a_killed_gateway_comes_back(deployment: Deployment) -> None:
    gateway = eventually(
        lambda: deployment.status()["gateways"][0]["pid"], "the gateway has reported"
    )
    os.kill(gateway, signal.SIGKILL)

    def answer() -> int | None:
        try:
            return post_body(deployment.port, "mlp", mlp_body(1))[0]
        except OSError:
            return None

    assert eventually(answer, "a new gateway answers") == 200, "it begins without routes"


def test_a_new_version_replaces_the_old_without_a_failed_request(deployment: Deployment) -> None:
    with Load(deployment.port, MLP, [mlp_body(1)], pause_s=0.001) as load:
        load.wait_for(500)
        old = [r["pid"] for r in replicas(deployment, "mlp")]
        applied = deployment.apply({**MODELS, "mlp": {**AT_ONCE, "version": "2"}})
        assert applied.returncode == 0, applied.stderr
        load.wait_for_version("2")
        eventually(lambda: not any(map(alive, old)), "the old replicas have ended")
        applied = deployment.apply({**MODELS, "mlp": {**AT_ONCE, "batching": {"max_size": 32}}})
        assert applied.returncode == 0, applied.stderr
        before = load.answers[200, "1"]
        eventually(lambda: load.answers[200, "1"] > before + 200, "version 1 answers again")
    assert load.failed == {}, load.failures
    assert load.broken == []
    assert load.wrong == []


def post(port: int, model: str, value: float) -> tuple[int, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [value] * 4}
    return post_body(port, model, {"inputs": [tensor]})


def post_body(port: int, model: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/{model}/infer", json.dumps(body).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
