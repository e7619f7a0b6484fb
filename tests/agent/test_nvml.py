"""What is read from NVML, by the real pynvml from a library whose GPUs the test makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

import pytest

from serving.agent.nvml import Nvml
from serving.core.gpus import Gpu, GpuProcess
from serving.errors import DeviceError
from tests.fake_nvml import GIB, FakeNvml, build, whole
from tests.fake_nvml.fixtures import load_here

MEASURED = (
    "memory", "utilization", "power", "power_limit", "energy", "temperature", "throttle", "ecc",
    "remapped", "processes",
)  # fmt: skip


@pytest.fixture
def nvml(nvml_here: FakeNvml) -> Iterator[Nvml]:
    opened = Nvml.open("node")
    yield opened
    opened.close()


def first(nvml: Nvml) -> Gpu:
    return nvml.gpus()[0]


def test_gpus_are_known_by_uuid(nvml: Nvml) -> None:
    assert nvml.driver == "580.65.06"
    assert nvml.gpus() == [
        Gpu(
            uuid=f"GPU-0000000{n}-0000-0000-0000-000000000000",
            node="node",
            index=n,
            name="NVIDIA A100-SXM4-80GB",
            memory_bytes=80 * GIB,
            pci=f"00000000:0{n + 1}:00.0",
        )
        for n in (0, 1)
    ]


def test_a_sample_has_everything_in_its_unit(nvml: Nvml, nvml_here: FakeNvml) -> None:
    nvml_here.set(
        "0",
        memory=f"{80 * GIB} {GIB} {3 * GIB}",
        utilization="35",
        power="91500",
        energy="123456",
        temperature="41",
        ecc="2",
        remapped="1 2 1 0",
        processes="4711:1000 4712:-",
    )
    sample = nvml.sample(first(nvml))
    assert (sample.memory_used, sample.memory_reserved) == (3.0 * GIB, 1.0 * GIB)
    assert sample.utilization == 0.35
    assert (sample.power_w, sample.power_limit_w, sample.energy_j) == (91.5, 400.0, 123.456)
    assert (sample.temperature_c, sample.ecc_uncorrected) == (41.0, 2.0)
    assert (sample.remapped_rows, sample.remap_pending, sample.remap_failure) == (3.0, True, False)
    assert sample.processes == (GpuProcess(4711, 1000), GpuProcess(4712, None))
    assert not sample.lost


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (0x0, ()),
        (0x1 | 0x2 | 0x100, ()),  # idle, or set by a person: nothing holds it back
        (0x4, ("sw_power_cap",)),
        (0x8 | 0x40, ("hw_slowdown", "hw_thermal_slowdown")),
        (0x20 | 0x80 | 0x10, ("sync_boost", "sw_thermal_slowdown", "hw_power_brake_slowdown")),
        (0x200 | 0x4000, ("board_limit", "reason_0x4000")),
    ],
)
def test_throttle_reasons_have_names(
    nvml: Nvml, nvml_here: FakeNvml, mask: int, names: tuple[str, ...]
) -> None:
    nvml_here.set("0", throttle=str(mask))
    assert nvml.sample(first(nvml)).throttle == names


def test_what_is_not_supported_is_absent(nvml: Nvml, nvml_here: FakeNvml) -> None:
    nvml_here.unset(*(f"0.{key}" for key in MEASURED))
    gpu = first(nvml)
    assert gpu.memory_bytes is None
    sample = nvml.sample(gpu).to_dict()
    assert sample.pop("at") > 0
    assert sample.pop("lost") is False
    assert set(sample.values()) == {None}


def test_an_older_library_lacks_functions_and_still_serves(
    fake_nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    fake_nvml.library = build(tmp_path / "old", "-DOLD_DRIVER")
    load_here(fake_nvml, monkeypatch)
    fake_nvml.set("0", memory=f"{80 * GIB} {GIB} {3 * GIB}", throttle="8")
    nvml = Nvml.open()
    gpu = first(nvml)
    assert not gpu.divided
    sample = nvml.sample(gpu)
    # Its memory call cannot tell the driver's share from that of processes.
    assert (sample.memory_used, sample.memory_reserved) == (4.0 * GIB, None)
    assert (sample.temperature_c, sample.throttle) == (31.0, ("hw_slowdown",))
    assert (sample.remapped_rows, sample.remap_failure) == (None, None)


def test_slices_come_after_their_gpu(nvml: Nvml, nvml_here: FakeNvml) -> None:
    uuids = [nvml_here.slice(0, slot, f"{slot + 7} 0") for slot in (0, 3)]
    gpus = nvml.gpus()
    assert [g.uuid for g in gpus[1:3]] == uuids
    assert [g.divided for g in gpus] == [True, False, False, False]
    assert [g.mig_parent for g in gpus] == [None, gpus[0].uuid, gpus[0].uuid, None]
    assert (gpus[1].memory_bytes, gpus[1].pci) == (10 * GIB, gpus[0].pci)
    sample = nvml.sample(gpus[1])
    assert (sample.memory_used, sample.processes) == (0.0, ())
    assert (sample.utilization, sample.power_w, sample.energy_j) == (None, None, None)


@pytest.mark.parametrize(
    "broken",
    [
        {"error": "15"},
        {"error": "16"},
        {"handle_error": "999"},
        {"memory_error": "999"},
    ],
    ids=["lost", "waits for a reset", "has no handle", "does not tell its memory"],
)
def test_a_gpu_that_breaks_stays_in_the_list_and_does_not_look_empty(
    nvml: Nvml, nvml_here: FakeNvml, caplog: pytest.LogCaptureFixture, broken: dict[str, str]
) -> None:
    before = nvml.gpus()
    nvml_here.set("1", **broken)
    assert nvml.gpus() == nvml.gpus() == before
    assert nvml.sample(before[1]).lost
    assert nvml.sample(before[1]).power_w is None
    assert not nvml.sample(before[0]).lost
    said = [m for m in caplog.messages if m.startswith("GPU 1 ")]
    assert len(said) == ("memory_error" not in broken), "once, not each second"
    nvml_here.unset(*(f"1.{key}" for key in broken))
    assert nvml.gpus() == before
    assert not nvml.sample(before[1]).lost


def test_a_gpu_that_was_broken_before_anyone_looked_is_no_gpu_without_memory(
    nvml: Nvml, nvml_here: FakeNvml
) -> None:
    nvml_here.set("1", memory_error="999")
    assert nvml.sample(nvml.gpus()[1]).lost


@pytest.mark.parametrize("refused", ["3", "4", "13", "25"])
def test_memory_that_nvml_may_not_tell_is_no_fault(
    nvml: Nvml, nvml_here: FakeNvml, refused: str
) -> None:
    # Not supported, no permission (as of a whole GPU in MIG mode), or an older driver.
    nvml_here.set("1", memory_error=refused)
    sample = nvml.sample(nvml.gpus()[1])
    assert (sample.lost, sample.memory_used, sample.power_w) == (False, None, 61.5)


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        ("1", [1]),
        ("1,0", [0, 1]),
        ("GPU-00000001", [1]),
        ("0,GPU-9,1", [0]),
        ("-1", []),
        ("", []),
    ],
)
def test_hidden_gpus_are_not_ours(
    nvml_here: FakeNvml, monkeypatch: pytest.MonkeyPatch, setting: str, indices: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert [g.index for g in Nvml.open().gpus()] == indices


def test_an_xid_error_has_its_gpu(nvml: Nvml, nvml_here: FakeNvml) -> None:
    nvml_here.raise_xid(0, 13)  # before anyone listens
    uuids = [g.uuid for g in nvml.gpus()]
    assert nvml.watch()
    assert nvml.next_xid(0.0) is None
    nvml_here.set("1", error="15")
    nvml_here.raise_xid(1, 79)
    nvml_here.raise_xid(0, 31)
    found = [nvml.next_xid(1.0), nvml.next_xid(1.0)]
    assert [(e.uuid, e.xid) for e in found if e] == [(uuids[1], 79), (uuids[0], 31)]
    assert nvml.next_xid(0.0) is None


def test_an_xid_error_of_a_slice_has_the_slice(nvml: Nvml, nvml_here: FakeNvml) -> None:
    nvml_here.slice(0, 0, "7 0")
    second = nvml_here.slice(0, 1, "8 0")
    assert nvml.watch()
    nvml_here.raise_xid(0, 31, "8:0")
    event = nvml.next_xid(1.0)
    assert event is not None
    assert (event.uuid, event.xid) == (second, 31)


def test_gpus_that_report_no_events_are_left_out(nvml: Nvml, nvml_here: FakeNvml) -> None:
    nvml_here.set("0", no_events="1")
    assert nvml.watch()
    nvml_here.set("1", no_events="1")
    assert not nvml.watch()


def test_no_driver_is_a_sentence(nvml_here: FakeNvml) -> None:
    nvml_here.facts["init_error"] = "9"
    nvml_here.write()
    with pytest.raises(DeviceError, match="NVML does not start: Driver Not Loaded"):
        Nvml.open()


@pytest.mark.skipif(find_library("nvidia-ml") is not None, reason="it is installed here")
def test_no_library_is_a_sentence() -> None:
    """In a process of its own, as pynvml finds a library only once."""
    code = (
        "from serving.agent.nvml import Nvml\nfrom serving.errors import DeviceError\n"
        "try: Nvml.open()\nexcept DeviceError as error: print(error)"
    )
    env = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout == "NVML does not start: NVML Shared Library Not Found\n"


def test_the_library_is_found_by_its_name(fake_nvml: FakeNvml) -> None:
    fake_nvml.gpus(whole(7, "NVIDIA L4", 24 * GIB))
    code = "from serving.agent.nvml import Nvml; print(Nvml.open().gpus()[0].name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **fake_nvml.env},
    )
    assert done.stdout == "NVIDIA L4\n"
