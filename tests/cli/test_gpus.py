"""`serving gpus` and its commands against the real admin API."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.core.gpus import Gpu, GpuProcess, GpuSample, NodeReport, XidEvent
from tests.cli.admin import admin_api
from tests.e2e.deployment import SERVING, serving
from tests.fake_nvml import FakeNvml

GIB = 1 << 30
A100 = Gpu("GPU-1b2c3d4e-0000", "n1", 0, "NVIDIA A100-SXM4-80GB", 80 * GIB, "0:1", divided=True)
SLICE = Gpu("MIG-5f6a7b8c-0000", "n1", 0, "NVIDIA A100 MIG 1g.10gb", 10 * GIB, "0:1", A100.uuid)
L4 = Gpu("GPU-9d8c7b6a-0000", "n1", 1, "NVIDIA L4", 24 * GIB, "0:2")
REPORT = NodeReport(
    "n1",
    "host-1",
    "580",
    (
        (A100, GpuSample(1.0, memory_used=1.0 * GIB, power_w=91.4, temperature_c=41.0)),
        (SLICE, GpuSample(1.0, memory_used=0.5 * GIB, memory_reserved=0.0, processes=())),
        (
            L4,
            GpuSample(
                1.0,
                memory_used=2.0 * GIB,
                memory_reserved=0.25 * GIB,
                utilization=0.5,
                throttle=("hw_thermal_slowdown",),
                processes=(GpuProcess(7, GIB), GpuProcess(8, None)),
            ),
        ),
    ),
    (XidEvent(A100.uuid, 74, 1.0),),
).to_dict()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with admin_api(tmp_path, {}, [REPORT]) as port:
        yield f"http://127.0.0.1:{port}"


def gpus(url: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return serving(
        "gpus",
        *arguments,
        "--url",
        url,
        home=home,
        env={"SERVING_ACTOR": "ann", "LC_ALL": "C.UTF-8"},
    )


def test_the_table_has_a_line_a_device_and_says_what_is_wrong(url: str, tmp_path: Path) -> None:
    done = gpus(url, home=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    assert lines[0] == "gpu node type health runs leased used free of GiB load W °C $/h"
    assert lines[2:5] == [
        "0 GPU-1b2c3d4e host-1 A100-SXM4-80GB failed, cordoned its slices "
        "0.0 1.0 79.0 80.0 – 91 41 3.43",
        "MIG-5f6a7b8c host-1 A100 MIG 1g.10gb failed, cordoned – 0.0 0.5 9.5 10.0 – – – 0.43",
        "1 GPU-9d8c7b6a host-1 L4 throttled 2 other processes 0.0 2.0 21.8 24.0 50 % – – 0.80",
    ]
    assert "host-1: GPU-1b2c3d4e: XID 74 (NVLink error)" in lines
    assert "host-1: GPU-1b2c3d4e: cordoned by controller: XID 74 (NVLink error)" in lines
    assert "host-1: GPU-9d8c7b6a: throttled: hw_thermal_slowdown" in lines


def test_a_gpu_is_cordoned_and_uncordoned(url: str, tmp_path: Path) -> None:
    done = gpus(url, "cordon", "GPU-9d", "--reason", "too hot", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{L4.uuid} is cordoned\n"), done.stderr
    found = json.loads(gpus(url, "--json", home=tmp_path).stdout)
    cordon = found["gpus"][2]["cordon"]
    assert (cordon["actor"], cordon["reason"]) == ("ann", "too hot")
    done = gpus(url, "uncordon", "GPU-9d", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{L4.uuid} is uncordoned\n"), done.stderr
    log = serving("audit", "--url", url, home=tmp_path).stdout
    assert [line.split()[4] for line in log.splitlines()[-2:]] == ["cordon", "uncordon"]
    assert "too hot" in log


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["cordon", "GPU-x", "--reason", "r"], 1, "no GPU 'GPU-x'; there are: GPU-1b2c3d4e-0000, "),
        (["cordon", "GPU-", "--reason", "r"], 1, "'GPU-' is the beginning of GPU-1b2c3d4e-0000, "),
        (["cordon", "GPU-9d"], 2, "Missing option '--reason'"),
        (["uncordon", "GPU-9d"], 1, "GPU-9d8c7b6a-0000 is not cordoned"),
        (["uncordon", "MIG-5"], 1, "cordoned with its GPU; uncordon that: GPU-1b2c3d4e-0000"),
    ],
)
def test_wrong_commands_are_one_line(
    url: str, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    done = gpus(url, *arguments, home=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_stands_before_a_command_is_refused(url: str, tmp_path: Path) -> None:
    done = serving("gpus", "--json", "cordon", "GPU-9d", "--reason", "r", home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--json stands before 'cordon'" in done.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_watching_repeats_until_interrupted(url: str, tmp_path: Path, as_json: bool) -> None:
    command = [*SERVING, "gpus", "--watch", "--url", url, *(["--json"] if as_json else [])]
    env = {**os.environ, "SERVING_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            begins = "{" if as_json else "gpu"
            found: list[str] = []
            while len(found) < 2:
                line = process.stdout.readline()
                assert line, "it ended"
                found += [line] if line.lstrip().startswith(begins) else []
        finally:
            process.terminate()
    if as_json:
        assert [len(json.loads(line)["gpus"]) for line in found] == [3, 3]


def test_watching_ends_with_one_sentence_when_the_controller_goes_away(tmp_path: Path) -> None:
    env = {**os.environ, "SERVING_HOME": str(tmp_path)}
    with admin_api(tmp_path, {}, [REPORT]) as port:
        url = f"http://127.0.0.1:{port}"
        command = [*SERVING, "gpus", "--watch", "--json", "--url", url]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["gpus"]
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert told.startswith(f"error: the controller has gone away: no controller answers at {url}")
    assert told.count("\n") == 1


def test_no_gpu_is_said_plainly(tmp_path: Path) -> None:
    problem = NodeReport("n2", "host-2", problem="NVML does not start: Driver Not Loaded").to_dict()
    with admin_api(tmp_path, {}, [problem]) as port:
        done = gpus(f"http://127.0.0.1:{port}", home=tmp_path)
    assert done.stdout.splitlines() == [
        "no GPU on any node",
        "node host-2: NVML does not start: Driver Not Loaded",
    ]


def findings(fake: FakeNvml, home: Path) -> dict[str, dict[str, Any]]:
    file = home / "serving.yaml"
    file.write_text("models: {big: {device: cuda}}\n")
    done = serving("doctor", "--json", "-f", file, home=home, env=fake.env)
    return {row["check"]: row for row in json.loads(done.stdout)}


def test_doctor_looks_at_every_gpu(
    fake_nvml: FakeNvml, cuda_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(cuda_library))
    monkeypatch.setenv("FAKE_CUDA_DRIVER", "12040")
    uuid = fake_nvml.slice(0, 2, "9 0")
    fake_nvml.set("1", remapped="0 3 0 1")
    found = findings(fake_nvml, tmp_path)
    assert found["NVML"]["fact"] == "driver 580.65.06, 2 GPU(s)"
    assert found["models.big.device"]["verdict"] == "ok"
    assert found["GPU 0"]["verdict"] == "ok"
    assert found["GPU 0"]["fact"].endswith("ok, in MIG mode: only its slices are used")
    assert f"10 GiB, {uuid}, ok" in found["MIG slice 0"]["fact"]
    assert found["GPU 1"]["verdict"] == "warn"
    assert "failed, a memory row could not be remapped" in found["GPU 1"]["fact"]
    assert "serving gpus cordon" in found["GPU 1"]["advice"]
    runtime = found["ONNX Runtime"]
    assert runtime["verdict"] == "warn"
    assert "the NVIDIA driver supports CUDA 12.4; ONNX Runtime is built for" in runtime["fact"]
    assert runtime["advice"].startswith("Update the driver")
