"""GPUs of a real deployment: real Ray, real agents, the fake NVML below the real pynvml."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.deployment import Deployment, eventually, serving
from tests.e2e.load import Load
from tests.e2e.test_faults import MLP, mlp_body, replicas
from tests.fake_nvml import GIB, FakeNvml, whole

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

REPO = Path(__file__).resolve().parents[2]
# Too large for the slice, which has 10 GiB.
MODELS = {"mlp": {"version": "1", "replicas": 2, "gpu_memory_bytes": 12 * GIB}}
SIMPLE = {"simple": {"version": "1", "gpu_memory_bytes": 2 * GIB}}


@pytest.fixture
def on_gpus(home: Path, fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """`serving up` on a machine with two A100s and a slice of a third.

    Its replicas hold leases on them, and run on the CPU.
    """
    fake_nvml.gpus(whole(0), whole(1), whole(2))
    fake_nvml.slice(2, 0, "1:0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{REPO}:{os.environ.get('PYTHONPATH', '')}")
    for name, value in fake_nvml.env.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "tests.e2e.up_on_fake_gpus"]
    with Gpus(home, MODELS, command) as running:
        yield running


class Gpus(Deployment):
    """A deployment, and what its GPUs are."""

    def seen(self) -> list[dict[str, Any]]:
        """What the admin API has: quicker than the command, for what is waited for."""
        gpus: list[dict[str, Any]] = self.get(self.control_port, "/v1/gpus")["gpus"]
        return gpus

    def on(self, model: str) -> list[str]:
        """The GPUs of a model's replicas, once there are as many as it is to have, all ready."""
        (found,) = (m for m in self.status()["models"] if m["name"] == model)
        (version,) = found["versions"]
        held = [
            (r["state"], gpu["uuid"])
            for gpu in self.seen()
            for r in gpu["replicas"]
            if r["model"] == model
        ]
        whole = [state for state, _ in held] == ["ready"] * version["wanted"]
        return [uuid for _, uuid in held] if whole else []

    def moved(self, model: str, *uuids: str) -> None:
        eventually(lambda: self.on(model) == sorted(uuids), f"{model} is on {uuids}")


def listed(deployment: Deployment) -> dict[str, Any]:
    done = serving("gpus", "--json", home=deployment.home)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_gpus_are_measured_and_replicas_move_off_those_that_are_cordoned(
    on_gpus: Gpus, fake_nvml: FakeNvml
) -> None:
    # They are found; whole GPUs and slices are there to be used.
    found = listed(on_gpus)
    first, second, divided, part = (gpu["uuid"] for gpu in found["gpus"])
    assert [gpu["health"] for gpu in found["gpus"]] == ["ok"] * 4
    assert [gpu["mig_parent"] for gpu in found["gpus"]] == [None, None, None, divided]
    assert [gpu["memory"]["free"] for gpu in found["gpus"][:2]] == [79.5 * GIB] * 2
    assert [(n["driver"], n["problem"]) for n in found["nodes"]] == [("580.65.06", "")]
    on_gpus.moved("mlp", first, second)

    # The first one counts its energy; what the second draws is added up.
    fake_nvml.unset("1.energy")

    def energy() -> dict[str, float]:
        found = on_gpus.get(on_gpus.control_port, "/v1/cost?by=gpu")["groups"]
        return {g["gpu"]: g["energy_wh_estimate"] or 0.0 for g in found}

    eventually(lambda: {first, second} <= energy().keys(), "both are charged")
    fake_nvml.set("0", energy="3601000")
    eventually(lambda: energy()[first] == pytest.approx(1.0), "a counter says how much")
    eventually(lambda: energy()[second] > 0, "power and time do, too")

    # They are measured; a throttled one is shown, and not chosen.
    fake_nvml.set("0", power="250000", throttle="72", memory=f"{80 * GIB} 0 {60 * GIB}")
    eventually(lambda: on_gpus.seen()[0]["health"] == "throttled", "it is measured")
    assert on_gpus.seen()[0]["sample"]["power_w"] == 250.0
    table = serving("gpus", home=on_gpus.home).stdout
    assert "throttled: hw_slowdown, hw_thermal_slowdown" in table
    families = {f.name: f for f in text_string_to_metric_families(on_gpus.metrics())}
    (used,) = [
        s.value
        for s in families["nv_gpu_memory_used_bytes"].samples
        if s.labels == {"gpu_uuid": first}
    ]
    assert used == 60.0 * GIB
    applied = on_gpus.apply({**MODELS, **SIMPLE})
    assert applied.returncode == 0, applied.stderr
    on_gpus.moved("simple", second)

    with Load(on_gpus.port, MLP, [mlp_body(1)], connections=4, pause_s=0.01) as load:
        # What runs on a cordoned GPU goes to others: to a slice where that is large enough.
        done = serving("gpus", "cordon", second[:12], "--reason", "smells", home=on_gpus.home)
        assert (done.returncode, done.stdout) == (0, f"{second} is cordoned\n"), done.stderr
        on_gpus.moved("simple", part)
        on_gpus.moved("mlp", first, first)
        done = serving("gpus", "uncordon", second, home=on_gpus.home)
        assert done.returncode == 0, done.stderr

        # A GPU that breaks is cordoned, and left, without anybody's doing; one replica dies of it.
        answered = load.count
        fake_nvml.raise_xid(0, 79)
        os.kill(replicas(on_gpus, "mlp")[0]["pid"], signal.SIGKILL)
        on_gpus.moved("mlp", second, second)
        load.wait_for(load.count + 100)
    assert (load.failed, load.broken) == ({}, []), load.failures
    assert load.count > answered + 100

    cordons = [gpu["cordon"]["reason"] if gpu["cordon"] else None for gpu in on_gpus.seen()]
    assert cordons == ["XID 79 (GPU has fallen off the bus)", None, None, None]
    entries = on_gpus.get(on_gpus.control_port, "/v1/audit")["entries"]
    assert [(e["action"], e["subject"]) for e in entries if "cordon" in e["action"]] == [
        ("cordon", second),
        ("uncordon", second),
        ("cordon", first),
    ]
    assert on_gpus.stop() == 0


def test_a_machine_without_gpus_runs_no_agent(deployment: Deployment) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has GPUs")
    done = serving("gpus", home=deployment.home)
    assert (done.returncode, done.stdout) == (0, "no GPU on any node\n"), done.stderr
    assert listed(deployment) == {"gpus": [], "nodes": [], "absent": []}
