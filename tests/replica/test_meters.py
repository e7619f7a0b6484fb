"""The driver's readings, through the real library calls into libraries that tests control."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_nvml import GIB, FakeNvml, whole

_BARE_UUID = "00010203-0405-0607-0809-0a0b0c0d0e0f"
_MIB = 1 << 20
# Each line of input is evaluated with these names and answered in JSON.
_PROCESS = """
import json, os, sys
from serving.errors import DeviceError
from serving.replica.backends import cuda
from serving.replica.backends.meters import DriverMeter

state = {}
def meter(limit=None):
    state["meter"] = DriverMeter(limit)
    return vars(state["meter"])

for line in sys.stdin:
    try:
        answer = eval(line)
    except DeviceError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer, default=lambda o: None), flush=True)
"""


class Process:
    """A process that sees one fake GPU."""

    def __init__(self, nvml: FakeNvml, cuda: Path, state: Path, **environment: str) -> None:
        self.state = state
        nvml.gpus({**whole(0), "uuid": f"GPU-{_BARE_UUID}"})
        self.nvml = nvml
        libraries = f"{cuda}:{nvml.env['LD_LIBRARY_PATH']}"
        self.child = subprocess.Popen(
            [sys.executable, "-c", _PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **nvml.env,
                "LD_LIBRARY_PATH": libraries,
                "FAKE_CUDA_STATE": str(state),
                **environment,
            },
        )

    def ask(self, expression: str) -> Any:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(expression + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())

    def uses(self, mib: int) -> None:
        self.nvml.set("0", memory=f"{80 * GIB} 0 {mib * _MIB}")

    def holds(self, mib: int) -> None:
        self.nvml.set("0", processes=f"1:{5 * GIB}", own_process=str(mib * _MIB))


@pytest.fixture
def process(
    fake_nvml: FakeNvml, cuda_library: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., Process]:
    def start(**environment: str) -> Process:
        started = Process(fake_nvml, cuda_library, tmp_path / "cuda.state", **environment)

        def stop() -> None:
            assert started.child.stdin is not None
            started.child.stdin.close()
            started.child.wait(30)
            assert started.child.stdout is not None
            started.child.stdout.close()

        request.addfinalizer(stop)
        return started

    return start


def test_a_context_works_until_it_is_broken(process: Callable[..., Process]) -> None:
    gpu = process()
    assert gpu.ask("cuda.missing_cuda()") is None
    assert gpu.ask("cuda.identity().name") == "Fake GPU"
    assert gpu.ask("cuda.identity().bare_uuid") == _BARE_UUID
    assert gpu.ask("cuda.context_fault()") is None
    gpu.state.write_text("2")
    assert gpu.ask("cuda.context_fault()") is None, "memory that is short is no broken context"
    assert gpu.ask("cuda.free_bytes()") is None
    gpu.state.write_text("0")
    assert gpu.ask("cuda.free_bytes()") == 1 << 30
    gpu.state.write_text("700")
    assert gpu.ask("cuda.free_bytes()") is None
    assert gpu.ask("cuda.context_fault()") == (
        "an illegal memory access was encountered (CUDA error 700)"
    )


def test_a_process_that_is_shown_no_gpu_says_so(process: Callable[..., Process]) -> None:
    gpu = process(CUDA_VISIBLE_DEVICES="")
    sentence = "the NVIDIA driver shows no device to this process"
    assert gpu.ask("cuda.missing_cuda()") == gpu.ask("cuda.context_fault()") == sentence


@pytest.mark.parametrize(
    ("driver", "built", "reason"),
    [
        ("13000", "13.2", None),  # what is new in a minor version, a driver of the major may lack
        ("13000", "12.8", None),
        ("12040", "13.0", "CUDA 12.4; torch is built for CUDA 13.0, which needs driver 580"),
        ("12090", "14.1", "CUDA 12.9; torch is built for CUDA 14.1, which needs a newer driver"),
        ("12040", "", None),  # a build for CPUs
    ],
)
def test_a_driver_may_be_too_old_for_a_runtime(
    process: Callable[..., Process], driver: str, built: str, reason: str | None
) -> None:
    found = process(FAKE_CUDA_DRIVER=driver).ask(f"cuda.old_driver('torch', {built!r})")
    if reason is None:
        assert found is None
    else:
        assert found.startswith(f"the NVIDIA driver supports {reason}")


def test_a_meter_reads_what_the_process_holds(process: Callable[..., Process]) -> None:
    gpu = process()
    gpu.uses(6000)
    gpu.holds(500)
    meter = gpu.ask("meter(10**9)")
    assert meter["uuid"] == f"GPU-{_BARE_UUID}"
    assert (meter["device_type"], meter["limit_bytes"]) == ("Fake GPU", 10**9)
    assert (meter["exact"], meter["context_bytes"]) == (True, 500 * _MIB)
    gpu.holds(900)
    gpu.uses(60_000)
    assert gpu.ask("state['meter'].held_bytes()") == 900 * _MIB
    assert gpu.ask("state['meter'].peak_bytes()") == 900 * _MIB


@pytest.mark.parametrize(
    ("processes", "own"),
    [
        ("1:1000", ""),
        # NVML knows the process, but not what it holds.
        ("1:1000", str(2**64 - 1)),
        # Of another PID namespace, a process has the same number.
        ("{pid}:1000", ""),
        ("{pid}:1000", "2000"),
    ],
)
def test_without_its_process_it_reads_what_the_gpu_holds_more(
    process: Callable[..., Process], processes: str, own: str
) -> None:
    gpu = process()
    gpu.uses(6000)
    gpu.nvml.set("0", processes=processes.format(pid=gpu.child.pid))
    if own:
        gpu.nvml.set("0", own_process=own)
    meter = gpu.ask("meter()")
    assert (meter["exact"], meter["context_bytes"]) == (False, 0)
    gpu.uses(7000)
    assert gpu.ask("state['meter'].held_bytes()") == 1000 * _MIB
    gpu.uses(5000)
    assert gpu.ask("state['meter'].held_bytes()") == 0


def test_what_nvml_no_longer_tells_is_not_taken_for_nothing(
    process: Callable[..., Process],
) -> None:
    gpu = process()
    gpu.uses(6000)
    gpu.holds(500)
    gpu.ask("meter()")
    gpu.nvml.set("0", processes_error="999")
    sentence = f"NVML does not tell any more what this process holds of GPU-{_BARE_UUID}"
    assert gpu.ask("state['meter'].held_bytes()") == {"error": sentence}


def test_a_slice_is_known_by_its_own_uuid(process: Callable[..., Process]) -> None:
    gpu = process()
    gpu.nvml.gpus(whole(0))
    gpu.nvml.slice(0, 2, "7 0")
    gpu.nvml.set("0.mig.2", uuid=f"MIG-{_BARE_UUID}")
    assert gpu.ask("meter()")["uuid"] == f"MIG-{_BARE_UUID}"


def test_a_gpu_that_nvml_does_not_know_is_an_error(process: Callable[..., Process]) -> None:
    gpu = process()
    gpu.nvml.gpus(whole(1))
    assert gpu.ask("meter()") == {
        "error": f"NVML does not know the device {_BARE_UUID} that CUDA shows"
    }


def test_a_gpu_that_is_lost_is_an_error(process: Callable[..., Process]) -> None:
    gpu = process()
    gpu.uses(0)
    gpu.ask("meter()")
    gpu.nvml.set("0", error="15")
    assert gpu.ask("state['meter'].held_bytes()") == {
        "error": f"the memory of GPU-{_BARE_UUID} cannot be read (NVML error 15)"
    }
