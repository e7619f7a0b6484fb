"""The commands against one running deployment, which every test leaves as it found it."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics.deployment import REQUESTS
from tests.e2e.deployment import SERVING, Deployment, eventually, free_port, serving
from tests.e2e.load import Load

pytestmark = [pytest.mark.cluster]

CHAMPION = {"mlp": {"version": "@champion"}}


def run(deployment: Deployment, *arguments: str | Path) -> Any:
    return serving(*arguments, home=deployment.home)


def body() -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}
    return {"inputs": [tensor]}


@pytest.fixture
def restored(deployment: Deployment) -> Iterator[Deployment]:
    """The deployment, for a test that applies something else."""
    yield deployment
    done = deployment.apply(CHAMPION)
    assert done.returncode == 0, done.stderr


def test_up_says_what_it_does_and_where_it_listens(deployment: Deployment) -> None:
    lines = deployment.log.read_text().splitlines()
    assert lines[0] == "starting Ray"
    ready = eventually(
        lambda: [x for x in deployment.log.read_text().splitlines() if x.startswith("ready: ")],
        "ready is said",
    )
    assert f"inference http://127.0.0.1:{deployment.port}" in ready[0]
    assert f"metrics http://127.0.0.1:{deployment.control_port}/metrics" in ready[0]


def test_nothing_listens_beyond_loopback(deployment: Deployment) -> None:
    processes = psutil.Process(deployment.process.pid).children(recursive=True)
    processes.append(psutil.Process(deployment.process.pid))
    found = {}
    for process in processes:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                address = ipaddress.ip_address(connection.laddr.ip)
                mapped = getattr(address, "ipv4_mapped", None)
                if not (mapped or address).is_loopback:
                    found[process.name()] = connection.laddr
    assert found == {}


def test_status_as_table_and_json(deployment: Deployment) -> None:
    table = run(deployment, "status", "-f", deployment.file)
    assert table.returncode == 0, table.stderr
    assert "mlp" in table.stdout
    assert f"http://127.0.0.1:{deployment.port}" in table.stdout
    found = json.loads(run(deployment, "status", "-f", deployment.file, "--json").stdout)
    (model,) = found["models"]
    (version,) = model["versions"]
    assert (version["state"], version["device"], version["ready"]) == ("ready", "cpu", 1)
    assert version["platform"] == "onnxruntime_onnx"
    assert version["digest"].startswith("sha256:")
    assert [r["state"] for r in version["replicas"]] == ["ready"]
    assert len(found["gateways"]) == 1


@pytest.mark.parametrize("suffix", ["npz", "npy", "json", "named.json", "request.json"])
def test_infer_takes_every_kind_of_input(
    deployment: Deployment, tmp_path: Path, suffix: str
) -> None:
    x = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)
    file = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(file, x=x)
    elif suffix == "npy":
        np.save(file, x)
    else:
        tensor = {"name": "x", "datatype": "FP32", "shape": [2, 64], "data": x.ravel().tolist()}
        forms = {"json": x.tolist(), "named.json": {"x": x.tolist()}}
        file.write_text(json.dumps(forms.get(suffix, {"inputs": [tensor]})))
    done = run(deployment, "infer", "mlp", "--input", file, "-f", deployment.file)
    assert done.returncode == 0, done.stderr
    (output,) = json.loads(done.stdout)["outputs"]
    assert (output["name"], output["shape"]) == ("p", [2, 10])
    assert np.sum(output["data"], axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_infer_takes_standard_input_and_every_way_to_name_a_version(
    deployment: Deployment,
) -> None:
    for model in ("mlp", "mlp/1", "mlp@champion"):
        done = subprocess.run(
            [*SERVING, "infer", model, "--input", "-"],
            env={**os.environ, "SERVING_HOME": str(deployment.home)},
            input=json.dumps([[0.5] * 64]),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["model_version"], answer["outputs"][0]["shape"]) == ("1", [1, 10])


def test_infer_sends_all_that_a_request_says(deployment: Deployment, tmp_path: Path) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}
    best = [{"name": "p", "parameters": {"classification": 2}}]
    file = tmp_path / "request.json"

    def infer(**members: Any) -> subprocess.CompletedProcess[str]:
        file.write_text(json.dumps({"inputs": [tensor], **members}))
        return run(deployment, "infer", "mlp", "--input", file, "-f", deployment.file)

    done = infer(id="one", outputs=best, parameters={"priority": 1})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["id"] == "one"
    assert answer["outputs"][0]["shape"] == [1, 2]
    for members, code, words in (
        ({"parameters": {"priority": 10}}, 1, "'priority' is 10"),
        ({"outputs": [{"name": "nobody"}]}, 1, "no output"),
        ({"misspelt": 1}, 1, "misspelt"),
        ({"inputs": [{**tensor, "datatype": "FP64"}]}, 2, "has datatype FP64; the model takes FP3"),
        ({"inputs": [{**tensor, "misspelt": 1}]}, 1, "misspelt"),
        ({"inputs": [tensor, tensor]}, 1, "has 2 inputs"),
        ({"parameters": 5}, 2, "parameters of the request must be an object"),
    ):
        done = infer(**members)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
        assert words in done.stderr


def test_infer_says_what_is_wrong(deployment: Deployment, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", y=np.zeros((1, 64), np.float32))
    np.save(tmp_path / "x.npy", np.zeros((1, 63), np.float32))
    good = tmp_path / "good.npy"
    np.save(good, np.zeros((1, 64), np.float32))
    (tmp_path / "broken.npz").write_bytes(b"not an archive")
    (tmp_path / "part.json").write_text('{"inputs": [{"name": "x"}]}')
    for arguments, code, words in (
        (["mlp", "--input", tmp_path / "x.npz"], 2, "no input y; its inputs: x"),
        (["mlp", "--input", tmp_path / "x.npy"], 1, "HTTP 400"),
        (["mlp", "--input", tmp_path / "missing.npy"], 2, "cannot be read"),
        (["mlp", "--input", deployment.file], 2, "expected a .npz, .npy or .json"),
        (["mlp", "--input", tmp_path / "broken.npz"], 2, "broken.npz"),
        (["mlp", "--input", tmp_path / "part.json"], 2, "must have name, shape and data"),
        (["mlp", "--input", "-"], 2, "standard input: "),
        (["mlp@nobody", "--input", good], 1, "no alias @nobody"),
        (["mlp/2", "--input", good], 1, "served versions: 1"),
        (["nobody", "--input", good], 1, "HTTP 404"),
        (["mlp", "--input", good, "--version", "7"], 1, "HTTP 404"),
    ):
        done = run(deployment, "infer", *arguments, "-f", deployment.file)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_second_up_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    same_home = run(deployment, "up", "-f", deployment.file)
    assert same_home.returncode == 1
    assert f"already runs on {deployment.home}" in same_home.stderr
    assert str(deployment.process.pid) in same_home.stderr
    file = tmp_path / "serving.yaml"
    file.write_text(f"gateway: {{port: {deployment.port}}}\ncontrol: {{port: {free_port()}}}\n")
    same_port = serving("up", "-f", file, home=tmp_path / "home")
    assert same_port.returncode == 1
    assert f"port {deployment.port}" in same_port.stderr
    assert f"by another `serving up` (process {deployment.process.pid})" in same_port.stderr


def test_doctor_knows_that_the_ports_are_ours(deployment: Deployment) -> None:
    done = run(deployment, "doctor", "-f", deployment.file)
    assert done.returncode == 0, done.stdout
    assert f"held by `serving up` ({deployment.process.pid})" in done.stdout


def test_the_scrape_is_valid_and_counts(deployment: Deployment) -> None:
    with Load(deployment.port, "/v2/models/mlp/infer", [body()], connections=2) as load:
        load.wait_for(200)
    assert load.failed == {}

    def counted() -> float:
        families = text_string_to_metric_families(deployment.metrics())
        samples = [s for f in families if f.name == REQUESTS.name for s in f.samples]
        return sum(s.value for s in samples if s.labels["outcome"] == "success")

    eventually(lambda: counted() >= load.count, "every answer is counted")


def test_a_dry_run_prints_the_plan_and_changes_nothing(deployment: Deployment) -> None:
    before = deployment.status()["apply"]["id"]
    file = deployment.home / "other.yaml"
    text = deployment.file.read_text().replace("'@champion'", "'2'")
    assert "'2'" in text
    file.write_text(text)
    done = run(deployment, "apply", "-f", file, "--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "mlp" in line]
    assert [(row[0], row[2]) for row in rows] == [("stop", "1"), ("start", "2")]
    assert deployment.status()["apply"]["id"] == before


def test_only_models_may_change(deployment: Deployment) -> None:
    file = deployment.home / "other.yaml"
    file.write_text(deployment.file.read_text() + "cluster: {num_cpus: 7}\n")
    done = run(deployment, "apply", "-f", file)
    assert done.returncode == 1
    assert "only models can change" in done.stderr
    assert "num_cpus" in done.stderr


def test_a_version_that_cannot_start_is_reported_and_the_old_one_serves(
    restored: Deployment,
) -> None:
    with Load(restored.port, "/v2/models/mlp/infer", [body()], connections=2) as load:
        done = restored.apply({"mlp": {"version": "2", "device": "cuda", "rollout": "immediate"}})
        assert done.returncode == 1
        assert "mlp version 2" in done.stderr
        assert "cuda" in done.stderr.lower()
        assert len(done.stderr.splitlines()) == 1
        load.wait_for(load.count + 100)
    assert load.failed == {}, load.failures
    assert {version for _, version in load.answers} == {"1"}
    states = {v["version"]: v["state"] for v in restored.status()["models"][0]["versions"]}
    assert states == {"1": "leaving", "2": "failed"}
    assert "cuda" in run(restored, "status", "-f", restored.file).stdout.lower()


def pids(deployment: Deployment) -> set[int]:
    replicas = deployment.status()["models"][0]["versions"][0]["replicas"]
    return {r["pid"] for r in replicas if r["state"] == "ready"}


def test_a_setting_of_the_gateways_replaces_no_replica(restored: Deployment) -> None:
    before = pids(restored)
    done = restored.apply({"mlp": {"version": "@champion", "timeout_ms": 5000}})
    assert done.returncode == 0, done.stderr
    assert "changed: timeout_s" in done.stdout
    assert pids(restored) == before
    table = restored.get(restored.control_port, "/v1/routes")
    assert table["models"][0]["arms"][0]["timeout_s"] == 5.0


def test_replicas_are_added_ended_and_replaced_without_a_failed_request(
    restored: Deployment,
) -> None:
    model: dict[str, Any] = {"version": "@champion"}
    with Load(restored.port, "/v2/models/mlp/infer", [body()], connections=4) as load:
        load.wait_for(100)
        [first] = pids(restored)
        done = restored.apply({"mlp": {**model, "replicas": 2}})
        assert done.returncode == 0, done.stderr
        assert "1 -> 2 replicas" in done.stdout
        both = pids(restored)
        assert len(both) == 2
        assert first in both
        load.wait_for(load.count + 200)
        done = restored.apply({"mlp": model})
        assert done.returncode == 0, done.stderr
        assert "2 -> 1 replicas" in done.stdout
        [left] = pids(restored)
        assert left in both
        load.wait_for(load.count + 200)
        done = restored.apply({"mlp": {**model, "batching": {"max_size": 16}}})
        assert done.returncode == 0, done.stderr
        assert "changed: max_size" in done.stdout
        assert not pids(restored) & both
        load.wait_for(load.count + 200)
    assert load.failed == {}, load.failures
    assert load.broken == []
