"""A real deployment is charged for exactly the time that it was there."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import threading
import time
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.replica.control import ANNOUNCE_PERIOD_S
from tests.e2e.deployment import Deployment, eventually, serving
from tests.e2e.test_faults import MLP, mlp_body, replicas

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

RUN_S = 12.0
USD_PER_HOUR = 3600.0
TOLERANCE = 0.005
KEY = "the key of small"
BUDGET_USD = 0.002
TENANTS = {
    "keys": {"small": [hashlib.sha256(KEY.encode()).hexdigest()]},
    "budgets": {"small": BUDGET_USD},
}


class Payers:
    """Clients that add up what their replies say they cost."""

    def __init__(self, port: int, count: int = 4) -> None:
        self._port = port
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.usd = Decimal(0)
        self.answers = 0
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        body = json.dumps(mlp_body(1 + 3 * number))
        usd, answers = Decimal(0), 0
        with closing(connection):
            while not self._stop.wait(0.001):
                connection.request("POST", MLP, body, {"content-type": "application/json"})
                with connection.getresponse() as reply:
                    reply.read()
                    if reply.status == 200:
                        usd += Decimal(reply.headers["x-inference-cost-usd"])
                        answers += 1
        with self._lock:
            self.usd += usd
            self.answers += answers

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def costs(deployment: Deployment) -> Any:
    return deployment.get(deployment.control_port, "/v1/cost?by=model,version")["total"]


def read(deployment: Deployment) -> tuple[float, float, int]:
    """When it was read, give or take how much, and what everything had cost then (nano-USD)."""
    before = time.monotonic()
    nano = costs(deployment)["nano_usd"]
    after = time.monotonic()
    return (before + after) / 2, (after - before) / 2, nano


def test_the_ledger_is_price_times_uptime(home: Path) -> None:
    models = {"mlp": {"version": "1", "replicas": 2, "usd_per_hour": USD_PER_HOUR}}
    with Deployment(home, models, tenants=TENANTS) as deployment:
        eventually(lambda: len(replicas(deployment, "mlp")) == 2, "two replicas")
        payers = Payers(deployment.port)
        try:
            # The first announcement, amid the start of everything, may have been long on its way.
            ready = time.monotonic()
            eventually(lambda: time.monotonic() - ready > 3 * ANNOUNCE_PERIOD_S, "some more")
            begin, early, before = read(deployment)
            eventually(lambda: time.monotonic() - begin > RUN_S, "the run is over")
            end, late, after = read(deployment)
        finally:
            payers.stop()
        charged_s = (after - before) / (2 * USD_PER_HOUR / 3600 * 1e9)
        # What is not known better than this is when a busy machine answered.
        unsure = TOLERANCE * (end - begin) + early + late
        assert charged_s == pytest.approx(end - begin, abs=unsure)

        eventually(lambda: costs(deployment)["requests"] == payers.answers, "all is reported", 10)
        # As a person sees it, the last replies' time included.
        done = serving("cost", "--json", "--since", "1h", "-f", deployment.file, home=home)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        [group] = found["groups"]
        assert (group["model"], group["version"]) == ("mlp", "1")
        direct = group["kinds"]["direct"]["nano_usd"]
        assert direct == pytest.approx(float(payers.usd * 10**9), rel=TOLERANCE)
        assert sum(kind["nano_usd"] for kind in group["kinds"].values()) == group["nano_usd"]
        per = group["usd_per_1000"]
        assert 0 < per["direct"] < per["loaded"]
        assert group["unpriced_seconds"] == 0
        assert group["energy_wh_estimate"] is None
        # Nothing failed, so nothing is charged as failed, now or when the grace is over.
        assert "failed" not in group["kinds"]

        status, _, _ = ask(deployment, "another key")
        assert status == 401
        eventually(lambda: ask(deployment, KEY)[0] == 429, "the budget is spent")

        # A replica and the controller are lost: what was charged stays, nothing is charged twice.
        spent = costs(deployment)["nano_usd"]
        pid = deployment.status()["controller"]["pid"]
        os.kill(replicas(deployment, "mlp")[0]["pid"], signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        eventually(lambda: _restarted(deployment, pid), "the controller is back")
        eventually(lambda: len(replicas(deployment, "mlp")) == 2, "two replicas again")
        now, _, total = read(deployment)
        most = 2 * USD_PER_HOUR / 3600 * (now - killed) * 1e9
        assert 0.5 * most < total - spent < 1.1 * most + 2e9

        # What was spent before the restart is spent after it, for one tenant only.
        [budget] = deployment.get(deployment.control_port, "/v1/cost?by=tenant")["budgets"]
        assert budget["spent_usd"] >= BUDGET_USD
        status, retry_after, error = ask(deployment, KEY)
        assert status == 429
        assert 0 < retry_after <= 86_400
        assert "tenant 'small' has spent its budget of the day" in error
        assert ask(deployment, None)[0] == 200
        array = home / "x.npy"
        np.save(array, np.zeros((1, 64), np.float32))
        arguments = ["infer", "mlp", "--input", array, "-f", deployment.file]
        refused = serving(*arguments, home=home, env={"SERVING_API_KEY": KEY})
        assert (refused.returncode, "has spent its budget" in refused.stderr) == (1, True)
        table = serving("cost", "--by", "tenant", "-f", deployment.file, home=home)
        assert re.search(r"small +0\.002 +0\.0\d+ +spent", table.stdout), table.stdout
        assert f'serving_tenant_budget_usd{{tenant="small"}} {BUDGET_USD}' in deployment.metrics()


def ask(deployment: Deployment, key: str | None) -> tuple[int, int, str]:
    """One inference with an API key: its status, Retry-After in seconds, and error."""
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    with closing(http.client.HTTPConnection("127.0.0.1", deployment.port, timeout=20)) as client:
        client.request("POST", MLP, json.dumps(mlp_body(1)), headers)
        with client.getresponse() as reply:
            found = json.loads(reply.read())
            return reply.status, int(reply.headers["retry-after"] or 0), found.get("error", "")


def _restarted(deployment: Deployment, pid: int) -> bool:
    try:
        return bool(deployment.status()["controller"]["pid"] != pid)
    except OSError:
        return False


def test_a_cpu_replica_has_the_price_of_its_cores(deployment: Deployment) -> None:
    eventually(lambda: costs(deployment)["nano_usd"] > 0, "the replica is charged")
    metrics = deployment.metrics()
    [line] = [
        x for x in metrics.splitlines() if x.startswith("serving_replica_price_usd_per_hour{")
    ]
    assert float(line.rsplit(" ", 1)[1]) == 0.0425
    for kind in ("warmup", "idle"):
        assert f'serving_cost_usd_total{{device="cpu",kind="{kind}",model="mlp"' in metrics
