"""Processes are killed under load; no client notices."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deployment import Deployment, eventually
from tests.e2e.load import Load

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(280)]

MLP = "/v2/models/mlp/infer"


def mlp_body(rows: int) -> dict[str, Any]:
    values = [(i % 17) / 17 for i in range(64 * rows)]
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 64], "data": values}
    return {"inputs": [tensor]}


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


def requests_total(deployment: Deployment, outcome: str = "success") -> float:
    """The counter, 0 before there is one; a controller that has just restarted has none yet."""
    try:
        text = deployment.metrics()
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
        return 0.0
    for line in text.splitlines():
        if line.startswith("serving_requests_total{") and f'outcome="{outcome}"' in line:
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def test_killed_replicas_cost_no_request(home: Path) -> None:
    models = {"mlp": {"version": "1", "replicas": 2}}
    with (
        Deployment(home, models) as deployment,
        Load(deployment.port, MLP, [mlp_body(1), mlp_body(3)], pause_s=0.002) as load,
    ):
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
    assert load.count >= 20_000


def test_killed_controller_costs_no_request_and_no_count(home: Path) -> None:
    with (
        Deployment(home, {"mlp": {"version": "1"}}) as deployment,
        Load(deployment.port, MLP, [mlp_body(1)], pause_s=0.002) as load,
    ):
        for round_number in range(1, 4):
            load.wait_for(3_000 * round_number)
            counted = eventually(lambda: requests_total(deployment), "counts are reported")
            first = deployment.status()["controller"]["pid"]
            os.kill(first, signal.SIGKILL)

            def restarted(first: int = first) -> bool:
                try:
                    return bool(deployment.status()["controller"]["pid"] != first)
                except (OSError, urllib.error.HTTPError):
                    return False

            eventually(restarted, "the controller is back")
            back = eventually(lambda: requests_total(deployment), "the counts are back", 10)
            assert back >= counted, "counts were lost"
        answered = load.count
        eventually(lambda: requests_total(deployment) >= answered, "all answers are counted")
        table = deployment.get(deployment.control_port, "/v1/routes")
        assert [m["name"] for m in table["models"]] == ["mlp"]
        assert len(table["models"][0]["arms"][0]["endpoints"]) == 1
    assert load.failed == {}, load.failures
    assert load.broken == []


def test_controller_and_replica_killed_together(home: Path) -> None:
    models = {"mlp": {"version": "1", "replicas": 2}}
    with (
        Deployment(home, models) as deployment,
        Load(deployment.port, MLP, [mlp_body(1)], pause_s=0.002) as load,
    ):
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


def test_a_hung_replica_is_replaced_and_its_callers_get_504(home: Path) -> None:
    models = {"sleeper": {"version": "1", "stall_timeout_s": 3.0, "timeout_ms": 1000}}
    with Deployment(home, models) as deployment:
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


def test_a_stopped_replica_is_left_out(home: Path) -> None:
    """SIGSTOP: its sockets stay open, so only the heartbeats tell."""
    models = {"mlp": {"version": "1", "replicas": 2}}
    with (
        Deployment(home, models) as deployment,
        Load(deployment.port, MLP, [mlp_body(1)], pause_s=0.002) as load,
    ):
        load.wait_for(500)
        stopped = replicas(deployment, "mlp")[0]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        try:
            load.wait_for(load.count + 5_000)
        finally:
            os.kill(stopped, signal.SIGKILL)
    assert load.failed == {}, load.failures
    assert load.broken == []
    assert load.slowest_s < 10


def test_a_killed_gateway_comes_back(home: Path) -> None:
    with Deployment(home, {"mlp": {"version": "1"}}) as deployment:
        gateway = eventually(
            lambda: deployment.status()["gateways"][0]["pid"], "the gateway has reported"
        )
        os.kill(gateway, signal.SIGKILL)

        def answers() -> bool:
            try:
                return post_body(deployment.port, "mlp", mlp_body(1))[0] == 200
            except OSError:
                return False

        eventually(answers, "a new gateway answers")


def test_a_new_version_replaces_the_old_without_a_failed_request(home: Path) -> None:
    at_once = {"rollout": "immediate"}
    with (
        Deployment(home, {"mlp": {"version": "1"}}) as deployment,
        Load(deployment.port, MLP, [mlp_body(1)], pause_s=0.001) as load,
    ):
        load.wait_for(500)
        old = replicas(deployment, "mlp")[0]["pid"]
        applied = deployment.apply({"mlp": {"version": "2", **at_once}})
        assert applied.returncode == 0, applied.stderr
        load.wait_for_version("2")
        eventually(lambda: not alive(old), "the old replica has ended")
        applied = deployment.apply(
            {"mlp": {"version": "1", "batching": {"max_size": 32}, **at_once}}
        )
        assert applied.returncode == 0, applied.stderr
        before = load.answers[200, "1"]
        eventually(lambda: load.answers[200, "1"] > before + 200, "version 1 answers again")
    assert load.failed == {}, load.failures
    assert load.broken == []


def test_ctrl_c_answers_what_was_admitted_and_leaves_no_process(home: Path) -> None:
    with Deployment(home, {"mlp": {"version": "1"}}) as deployment:
        pids = [
            deployment.status()["controller"]["pid"],
            *(r["pid"] for r in replicas(deployment, "mlp")),
        ]
        results: list[int] = []
        with Load(deployment.port, MLP, [mlp_body(1)]) as load:
            load.wait_for(1_000)
            stopper = threading.Thread(target=lambda: results.append(deployment.stop()))
            stopper.start()
            eventually(lambda: load.broken, "connections are refused")
        stopper.join()
        assert results == [0], deployment.log.read_text()
        assert load.failed == {}, load.failures
        # Who was connected got an answer; the others were not let in. The listener's own queue is
        # the exception: a connection that the gateway has not accepted ends with its listener.
        unanswered = [b for b in load.broken if not b.startswith("connect")]
        assert len(unanswered) <= 8, unanswered
        assert len(unanswered) < len(load.broken)
        assert not [pid for pid in pids if alive(pid)]


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
