"""The agent's two threads: measurements every period, XID errors when they happen."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from serving.agent.energy import PowerIntegral
from serving.agent.events import XidWatcher
from serving.agent.nvml import Nvml
from serving.agent.poller import Poller, Readings
from serving.core.gpus import Gpu, GpuSample, XidEvent
from serving.errors import DeviceError
from tests.fake_nvml import FakeNvml

LONG_S = 20.0


@pytest.fixture
def nvml(nvml_here: FakeNvml) -> Iterator[Nvml]:
    opened = Nvml.open("node")
    yield opened
    opened.close()


def test_measurements_follow_what_happens(nvml: Nvml, nvml_here: FakeNvml) -> None:
    told: queue.Queue[Readings] = queue.Queue()
    poller = Poller(nvml, told.put, period_s=0.01)
    poller.start()
    try:
        assert [s.power_w for _, s in told.get(timeout=LONG_S)] == [61.5, 61.5]
        nvml_here.set("1", power="250000")
        assert poller.alive
        while [s.power_w for _, s in told.get(timeout=LONG_S)] != [61.5, 250.0]:
            pass
    finally:
        poller.stop()
    assert not poller.alive


def test_a_failed_measurement_is_repeated(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, failures = nvml.gpus, iter(range(2))

    def flaky() -> object:
        if next(failures, None) is not None:
            raise DeviceError("NVML does not count its GPUs: Unknown Error")
        return gpus()

    monkeypatch.setattr(nvml, "gpus", flaky)
    told: queue.Queue[Readings] = queue.Queue()
    poller = Poller(nvml, told.put, period_s=0.01)
    poller.start()
    try:
        assert len(told.get(timeout=LONG_S)) == 2
        assert next(failures, None) is None
    finally:
        poller.stop()


def test_errors_arrive_at_once_and_in_order(nvml: Nvml, nvml_here: FakeNvml) -> None:
    told: queue.Queue[XidEvent] = queue.Queue()
    watcher = XidWatcher(nvml, told.put)
    watcher.start()
    try:
        for number in (13, 79):
            nvml_here.raise_xid(1, number)
        assert [told.get(timeout=LONG_S).xid for _ in range(2)] == [13, 79]
    finally:
        watcher.stop()
    nvml_here.raise_xid(1, 94)
    assert told.empty()


def test_where_no_gpu_reports_errors_none_are_waited_for(nvml: Nvml, nvml_here: FakeNvml) -> None:
    for number in "01":
        nvml_here.set(number, no_events="1")
    watcher = XidWatcher(nvml, lambda _: None)
    watcher.start()
    watcher.stop()


def test_waiting_goes_on_after_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.agent.events._PAUSE_S", 0.01)
    outcomes: list[XidEvent | DeviceError] = [DeviceError("GPU is lost"), XidEvent("g", 79, 1.0)]

    class Source:
        def watch(self) -> bool:
            return True

        def next_xid(self, timeout_s: float) -> XidEvent | None:
            found = outcomes.pop(0) if outcomes else None
            if isinstance(found, DeviceError):
                raise found
            return found

    told: queue.Queue[XidEvent] = queue.Queue()
    watcher = XidWatcher(Source(), told.put)
    watcher.start()
    try:
        assert told.get(timeout=LONG_S).xid == 79
    finally:
        watcher.stop()


def test_energy_without_a_counter_is_power_times_time(nvml: Nvml, nvml_here: FakeNvml) -> None:
    nvml_here.unset("1.energy")
    told: queue.Queue[Readings] = queue.Queue()
    poller = Poller(nvml, told.put, period_s=0.01)
    poller.start()
    try:
        samples = [[s for _, s in told.get(timeout=LONG_S)] for _ in range(20)]
    finally:
        poller.stop()
    counted, added = samples[0][0], [second.power_energy_j or 0.0 for _, second in samples]
    assert (counted.energy_j, counted.power_energy_j, counted.used_j) == (1.0, None, 1.0)
    assert added == sorted(added)
    assert 19 * 0.01 * 61.5 * 0.5 < added[-1] < LONG_S * 61.5
    assert samples[-1][1].used_j == added[-1]


def test_what_was_not_measured_for_long_is_no_energy() -> None:
    energy, gpu = PowerIntegral(), Gpu("GPU-1", "n", 0, "NVIDIA L4", 24 << 30)

    def joules(now: float, watts: float | None) -> float | None:
        return energy.added(gpu, GpuSample(0.0, power_w=watts), now).used_j

    assert [joules(0.0, 100.0), joules(1.0, 300.0), joules(2.0, None)] == [0.0, 200.0, None]
    assert joules(3.0, 300.0) == 800.0
    assert joules(100.0, 300.0) == 800.0
    assert joules(101.0, 300.0) == 1100.0
