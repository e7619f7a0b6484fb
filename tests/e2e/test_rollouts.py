"""Rollouts for real: `serving up`, real replicas, real traffic, versions that fail."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.e2e.deployment import Deployment, eventually, register, serving
from tests.e2e.load import Load
from tests.e2e.rollout_models import write, write_sample

pytestmark = pytest.mark.cluster
PATH = "/v2/models/double/infer"
RATE = 200
CLIENTS = 20
# 5 % for as long as it takes; no copies first, so that clients meet the canary at once.
HELD = {"plan": "fast", "shadow": False, "steps": [{"weight": 5, "hold": "5m"}]}
QUICK = {
    "plan": "fast",
    "shadow": {"min_pairs": 50, "max_duration": "5s"},
    "steps": [{"weight": 5, "hold": "2s"}, {"weight": 50, "hold": "2s"}],
    "bake": {"duration": "2s"},
}
GOOD, FAILING, BROKEN = "2", "3", "4"
GATEWAYS = 2
# What it takes on a machine that has nothing else to do is measured by `benchmarks.rollouts.live`.
ROLLBACK_MS = 2_000


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Version 1 of `double` serves, and others are there to be rolled out.

    Every test ends with a rollback: the next one finds version 1 again.
    """
    home = tmp_path_factory.mktemp("rollouts")
    work = tmp_path_factory.mktemp("versions")
    sample = write_sample(work / "sample.npz")
    versions: list[dict[str, Any]] = [
        {},
        {},
        {"fails_below": 0.05},
        {"fails_below": 1.0},
    ]
    paths = [write(work / f"v{i}.ts", **settings) for i, settings in enumerate(versions)]
    register(home, *(["double", path, "--sample", sample, "--batch", "dynamic"] for path in paths))
    models = {"double": {"version": "1", "rollout": HELD}}
    with Deployment(home, models, gateway={"replicas": GATEWAYS}) as running:
        yield running


def traffic(deployment: Deployment) -> Load:
    """`RATE` requests a second at most; first values are uniform in [0, 1)."""
    values = np.random.default_rng(7).random((997, 4)).astype(np.float32)
    bodies = [
        {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": row.tolist()}]}
        for row in values
    ]
    return Load(deployment.port, PATH, bodies, connections=CLIENTS, pause_s=CLIENTS / RATE)


def rollout(deployment: Deployment) -> dict[str, Any]:
    found: dict[str, Any] = deployment.get(deployment.control_port, "/v1/rollouts/double")
    return found


def start(deployment: Deployment, version: str, plan: dict[str, Any] = HELD) -> None:
    model = {"version": "1", "rollout": plan}
    if deployment.config["models"] != {"double": model}:
        done = deployment.apply({"double": model})
        assert done.returncode == 0, done.stderr
    done = serving("rollout", "start", "double", "--to", version, home=deployment.home)
    assert done.returncode == 0, done.stderr


def until(deployment: Deployment, state: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """The rollout once it is in `state`."""

    def there() -> dict[str, Any] | None:
        now = rollout(deployment)
        assert now["state"] == state or now["finished_at"] is None, now["reason"]
        return now if now["state"] == state else None

    found: dict[str, Any] = eventually(there, f"{state}: {rollout(deployment)}", timeout_s)
    return found


def under_load(deployment: Deployment, version: str, wanted: str, timeout_s: float = 60.0) -> Load:
    """Roll `version` out under load; returns what the clients saw."""
    with traffic(deployment) as load:
        load.wait_for(RATE)
        start(deployment, version)
        until(deployment, wanted, timeout_s)
        load.wait_for(load.count + RATE)
    return load


def test_a_healthy_version_is_promoted(deployment: Deployment) -> None:
    with traffic(deployment) as load:
        load.wait_for(RATE)
        start(deployment, GOOD, QUICK)
        until(deployment, "succeeded")
        load.wait_for(load.count + RATE)
        assert serving("rollback", "double", home=deployment.home).returncode == 0
        after = load.count
        until(deployment, "rolled_back", 10)
        load.wait_for(after + RATE)
    took_ms = rollout(deployment)["rollback_ms"]
    assert 0 < took_ms < ROLLBACK_MS
    assert "serving_rollback_seconds{" in deployment.metrics()
    assert load.failed == {}
    assert load.broken == []
    assert {version for _, version in load.answers} == {"1", GOOD}
    audited = serving("audit", "verify", home=deployment.home)
    assert audited.returncode == 0, audited.stderr


def test_a_version_that_fails_one_request_in_twenty_is_taken_back_unnoticed(
    deployment: Deployment,
) -> None:
    load = under_load(deployment, FAILING, "rolled_back")
    assert load.failed == {}
    assert load.broken == []
    assert 0 < rollout(deployment)["rollback_ms"] < ROLLBACK_MS
    ended = rollout(deployment)
    (cost,) = (v["sentence"] for v in ended["verdicts"] if v["trigger"] == "cost")
    assert re.search(r"canary cost \$\S+ per 1,000 \(\S+ ms .*, stable cost \$\S+ per 1,000", cost)
    assert ended["arms"]["stable"]["usd_per_1000"] > 0
    (failed,) = (v for v in rollout(deployment)["verdicts"] if v["verdict"] == "fail")
    assert failed["trigger"] == "errors"
    explained = serving("rollout", "explain", "double", home=deployment.home)
    assert failed["sentence"] in " ".join(explained.stdout.split()), explained.stdout


def test_a_version_that_fails_every_request_is_taken_back_at_once(deployment: Deployment) -> None:
    with traffic(deployment) as load:
        load.wait_for(RATE)
        start(deployment, BROKEN)
        until(deployment, "observing", 60)
        since = time.monotonic()
        until(deployment, "rolled_back", 20)
        # Two seconds is what it must reach; here a loaded machine may take a little longer.
        assert time.monotonic() - since < 6
        load.wait_for(load.count + RATE)
    assert load.failed == {}
    assert load.broken == []
