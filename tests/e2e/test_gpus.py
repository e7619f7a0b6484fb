"""GPUs of a real deployment: real Ray, real agents, the fake NVML below the real pynvml."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.deployment import Deployment, eventually, serving
from tests.fake_nvml import GIB, FakeNvml

pytestmark = pytest.mark.cluster


@pytest.fixture
def on_gpus(
    tmp_path: Path, fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Deployment]:
    """`serving up` on a machine with two A100s, without a model."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in fake_nvml.env.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "home"
    home.mkdir()
    with Deployment(home, {}) as running:
        yield running


def seen(deployment: Deployment) -> list[dict[str, Any]]:
    """What the admin API has: quicker than the command, for what is waited for."""
    gpus: list[dict[str, Any]] = deployment.get(deployment.control_port, "/v1/gpus")["gpus"]
    return gpus


def listed(deployment: Deployment) -> dict[str, Any]:
    done = serving("gpus", "--json", home=deployment.home)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_gpus_are_found_measured_and_cordoned(on_gpus: Deployment, fake_nvml: FakeNvml) -> None:
    eventually(lambda: len(seen(on_gpus)) == 2, "two GPUs are reported")
    found = listed(on_gpus)
    first, second = (gpu["uuid"] for gpu in found["gpus"])
    assert [gpu["health"] for gpu in found["gpus"]] == ["ok", "ok"]
    assert [gpu["memory"]["free"] for gpu in found["gpus"]] == [79.5 * GIB] * 2
    assert [(n["driver"], n["problem"]) for n in found["nodes"]] == [("580.65.06", "")]

    # The first one counts its energy; what the second draws is added up.
    fake_nvml.unset("1.energy")

    def energy() -> dict[str, float]:
        found = on_gpus.get(on_gpus.control_port, "/v1/cost?by=gpu")["groups"]
        return {g["gpu"]: g["energy_wh_estimate"] or 0.0 for g in found}

    eventually(lambda: len(energy()) == 2, "both are charged")
    fake_nvml.set("0", energy="3601000")
    eventually(lambda: energy()[first] == pytest.approx(1.0), "a counter says how much")
    eventually(lambda: energy()[second] > 0, "power and time do, too")
    fake_nvml.set("0", power="250000", throttle="72", memory=f"{80 * GIB} 0 {60 * GIB}")
    eventually(lambda: seen(on_gpus)[0]["sample"]["power_w"] == 250.0, "it is measured")
    table = serving("gpus", home=on_gpus.home).stdout
    assert "throttled: hw_slowdown, hw_thermal_slowdown" in table
    families = {f.name: f for f in text_string_to_metric_families(on_gpus.metrics())}
    (used,) = [
        s.value
        for s in families["nv_gpu_memory_used_bytes"].samples
        if s.labels == {"gpu_uuid": first}
    ]
    assert used == 60.0 * GIB

    done = serving("gpus", "cordon", second[:12], "--reason", "smells", home=on_gpus.home)
    assert (done.returncode, done.stdout) == (0, f"{second} is cordoned\n"), done.stderr
    fake_nvml.raise_xid(0, 79)
    cordons = eventually(
        lambda: (c := [g["cordon"] for g in seen(on_gpus)]) and all(c) and c,
        "the error of its hardware cordons the other one",
    )
    assert [c["reason"] for c in cordons] == ["XID 79 (GPU has fallen off the bus)", "smells"]
    entries = on_gpus.get(on_gpus.control_port, "/v1/audit")["entries"]
    assert [(e["action"], e["subject"]) for e in entries if "cordon" in e["action"]] == [
        ("cordon", second),
        ("cordon", first),
    ]
    done = serving("gpus", "uncordon", second, home=on_gpus.home)
    assert done.returncode == 0, done.stderr
    assert [bool(g["cordon"]) for g in seen(on_gpus)] == [True, False]
    assert on_gpus.stop() == 0


def test_a_machine_without_gpus_runs_no_agent(deployment: Deployment) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has GPUs")
    done = serving("gpus", home=deployment.home)
    assert (done.returncode, done.stdout) == (0, "no GPU on any node\n"), done.stderr
    assert listed(deployment) == {"gpus": [], "nodes": [], "absent": []}
