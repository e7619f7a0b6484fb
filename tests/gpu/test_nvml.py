"""The node agent's own parts on a real GPU: who it is, and what is measured of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch

from serving.agent.nvml import Nvml
from serving.agent.poller import Poller
from serving.core.gpus import Gpu, GpuSample
from serving.replica.backends import cuda
from tests.gpu.conftest import Tell

pytestmark = pytest.mark.gpu
GIB = 1 << 30


@pytest.fixture
def nvml() -> Iterator[Nvml]:
    found = Nvml.open("node")
    yield found
    found.close()


def test_a_gpu_has_the_same_uuid_name_and_memory_for_nvml_and_cuda(nvml: Nvml, tell: Tell) -> None:
    """Profiles are kept by CUDA's name of a device, and placed by NVML's."""
    mine, total = the_first(nvml), torch.cuda.get_device_properties(0).total_memory
    tell(driver=nvml.driver, gpu=asdict(mine), cuda=asdict(cuda.identity()), cuda_bytes=total)
    assert mine.name == cuda.identity().name
    assert mine.memory_bytes == pytest.approx(total, rel=0.05)
    assert nvml.driver


def test_the_agent_measures_power_energy_temperature_and_memory(nvml: Nvml, tell: Tell) -> None:
    mine = the_first(nvml)
    if mine.mig_parent is not None:
        pytest.skip("a MIG slice has no power and no energy of its own")
    a = torch.ones((8192, 8192), device="cuda")
    spend(a, 1.5)
    before = nvml.sample(mine)
    ballast = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    busy = polled(nvml, mine, a)
    del ballast
    listening = nvml.watch()
    tell(before=asdict(before), last=asdict(busy[-1]), hears_xids=listening)

    for sample in busy:
        assert not sample.lost
        assert sample.temperature_c is not None
        assert 10 < sample.temperature_c < 110
        assert sample.power_w is not None
        assert 30 < sample.power_w < 1500
        assert sample.utilization is not None
        assert 0.0 <= sample.utilization <= 1.0
    assert max(sample.utilization or 0.0 for sample in busy) > 0.5
    assert busy[-1].memory_used is not None
    assert before.memory_used is not None
    assert busy[-1].memory_used - before.memory_used == pytest.approx(GIB, rel=0.1)
    # The counter is in joules if what it grew by is what was drawn meanwhile.
    first, last = busy[0], busy[-1]
    assert first.energy_j is not None
    assert last.energy_j is not None
    drawn = sum(sample.power_w or 0.0 for sample in busy) / len(busy) * (last.at - first.at)
    tell(energy_j=last.energy_j - first.energy_j, power_by_time_j=drawn)
    assert 0.4 < (last.energy_j - first.energy_j) / drawn < 2.5


def the_first(nvml: Nvml) -> Gpu:
    """The device that CUDA shows first, as NVML shows it."""
    bare = cuda.identity().bare_uuid
    found = {gpu.uuid.partition("-")[2]: gpu for gpu in nvml.gpus()}
    assert bare in found, f"NVML has {sorted(found)}, CUDA {bare}"
    return found[bare]


def spend(a: torch.Tensor, seconds: float) -> None:
    """Multiply for so long: what is measured is to be of a GPU that works."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.mm(a, a)
        torch.cuda.synchronize()


def polled(nvml: Nvml, gpu: Gpu, a: torch.Tensor) -> list[GpuSample]:
    """What the agent's poller measures of a GPU that works, about three seconds long."""
    heard: list[GpuSample] = []
    poller = Poller(
        nvml, lambda readings: heard.extend(s for g, s in readings if g.uuid == gpu.uuid), 0.5
    )
    poller.start()
    try:
        deadline = time.monotonic() + 30
        while len(heard) < 7:
            assert poller.alive
            assert time.monotonic() < deadline, f"only {len(heard)} readings in 30 s"
            spend(a, 0.1)
    finally:
        poller.stop()
    return heard
