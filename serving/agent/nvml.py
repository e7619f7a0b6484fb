"""NVML, NVIDIA's management library: the only module that imports pynvml.

GPUs are known by UUID: NVML counts them in PCI order, CUDA maybe in another. What a device, a
driver or a MIG slice does not support is None. The library's calls may be made from any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pynvml

from serving.core.gpus import Gpu, GpuProcess, GpuSample, XidEvent, visible
from serving.errors import DeviceError

_log = logging.getLogger(__name__)

VISIBLE_DEVICES: Final = "CUDA_VISIBLE_DEVICES"

_NO_INSTANCE: Final = 0xFFFFFFFF
_THROTTLE_REASONS: Final = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
    pynvml.nvmlClocksThrottleReasonBoardLimit: "board_limit",
}
# Clocks are low because nothing runs, or because someone set them so.
_NO_THROTTLE: Final = (
    pynvml.nvmlClocksEventReasonGpuIdle
    | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
    | pynvml.nvmlClocksEventReasonDisplayClockSetting
)
# It can be used no more until it is reset, or ever.
_BROKEN: Final = (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired)
# Why NVML may rightly not tell the memory of a device. After any other error nobody knows what is
# free on it.
_NOT_TOLD: Final = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_ArgumentVersionMismatch,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NotFound,
    pynvml.NVMLError_InvalidArgument,
)


def usable_devices() -> list[str]:
    """UUIDs of this machine's devices that work can be placed on: whole GPUs and MIG slices.

    Those that CUDA_VISIBLE_DEVICES allows; none without a driver. Raises `DeviceError`.
    """
    try:
        nvml = Nvml.open()
    except DeviceError:
        return []  # no driver
    try:
        return [gpu.uuid for gpu in nvml.gpus() if not gpu.divided]
    finally:
        nvml.close()


class _Lost(Exception):
    """The GPU does not answer any more."""


class Nvml:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES allows.

    `node` goes into each `Gpu`. Use `open`, and `close` in the end.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._visible = os.environ.get(VISIBLE_DEVICES)
        self._handles: dict[str, Any] = {}
        self._known: dict[int, list[Gpu]] = {}
        self._sizes: dict[str, int] = {}
        self._silent: set[int] = set()
        self._events: Any = None

    @classmethod
    def open(cls, node: str = "") -> Nvml:
        """Start the library. Raises `DeviceError` where there is no driver."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DeviceError(f"NVML does not start: {error}") from error
        return cls(node)

    def close(self) -> None:
        """Let go of the library."""
        with contextlib.suppress(pynvml.NVMLError):
            if self._events is not None:
                pynvml.nvmlEventSetFree(self._events)
            pynvml.nvmlShutdown()

    @property
    def driver(self) -> str | None:
        """The driver's version."""
        version = _ask(pynvml.nvmlSystemGetDriverVersion)
        return None if version is None else str(version)

    def gpus(self) -> list[Gpu]:
        """Every GPU, and after it its MIG slices. Raises `DeviceError`.

        One that does not answer is as it was when it last did.
        """
        try:
            count = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            raise DeviceError(f"NVML does not count its GPUs: {error}") from error
        for index in range(count):
            try:
                self._known[index] = list(self._look(index))
                self._silent.discard(index)
            except _Lost as error:
                if index not in self._silent:
                    _log.warning("GPU %d does not answer: %s", index, error.__cause__)
                self._silent.add(index)
        found = [gpu for index in sorted(self._known) for gpu in self._known[index]]
        return visible(found, self._visible)

    def sample(self, gpu: Gpu) -> GpuSample:
        """What is measured on one of `gpus` now."""
        now = time.time()
        if gpu.index in self._silent:
            return GpuSample(now, lost=True)
        try:
            return _measure(self._handles[gpu.uuid], now)
        except _Lost:
            return GpuSample(now, lost=True)

    def watch(self) -> bool:
        """Begin to listen for XID errors; whether any GPU reports them."""
        listening = False
        with contextlib.suppress(pynvml.NVMLError):
            self._events = pynvml.nvmlEventSetCreate()
        for gpu in self.gpus() if self._events is not None else ():
            if gpu.mig_parent is None:
                with contextlib.suppress(pynvml.NVMLError):
                    pynvml.nvmlDeviceRegisterEvents(
                        self._handles[gpu.uuid], pynvml.nvmlEventTypeXidCriticalError, self._events
                    )
                    listening = True
        return listening

    def next_xid(self, timeout_s: float) -> XidEvent | None:
        """The next XID error, or None after `timeout_s`. Raises `DeviceError`; blocks."""
        try:
            data = pynvml.nvmlEventSetWait_v2(self._events, int(timeout_s * 1000))
        except pynvml.NVMLError_Timeout:
            return None
        except pynvml.NVMLError as error:
            raise DeviceError(f"NVML does not wait for events: {error}") from error
        return XidEvent(self._owner(data), int(data.eventData), time.time())

    def _look(self, index: int) -> Iterator[Gpu]:
        handle = _must(pynvml.nvmlDeviceGetHandleByIndex, index)
        mode = _ask(pynvml.nvmlDeviceGetMigMode, handle)
        divided = mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        whole = self._gpu(handle, index, divided=divided)
        yield whole
        slots = _ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) if divided else 0
        for slot in range(slots or 0):
            part = _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot)
            if part is not None:
                yield self._gpu(part, index, parent=whole)

    def _gpu(
        self, handle: Any, index: int, parent: Gpu | None = None, divided: bool = False
    ) -> Gpu:
        uuid = str(_must(pynvml.nvmlDeviceGetUUID, handle))
        self._handles[uuid] = handle
        with contextlib.suppress(_Lost):  # that, its sample says
            if (memory := _memory(handle)) is not None:
                self._sizes[uuid] = int(memory.total)
        return Gpu(
            uuid,
            self._node,
            index,
            name=str(_ask(pynvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"),
            memory_bytes=self._sizes.get(uuid),
            pci=_pci(handle) if parent is None else parent.pci,
            mig_parent=None if parent is None else parent.uuid,
            divided=divided,
        )

    def _owner(self, data: Any) -> str:
        """The UUID that an event is about: that of a slice where it names one."""
        # By handle, because a GPU that fell off the bus cannot be asked for its UUID.
        address = _address(data.device)
        whole = next((u for u, h in list(self._handles.items()) if _address(h) == address), "")
        if data.gpuInstanceId != _NO_INSTANCE:
            place = (data.gpuInstanceId, data.computeInstanceId)
            for gpu in (g for known in list(self._known.values()) for g in known):
                if gpu.mig_parent == whole and _instances(self._handles[gpu.uuid]) == place:
                    return gpu.uuid
        return whole


def _measure(handle: Any, now: float) -> GpuSample:
    memory = _memory(handle, version=pynvml.nvmlMemory_v2)
    reserved = memory.reserved if memory is not None else None
    if memory is None:
        memory = _memory(handle)
    rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    remapped = _ask(pynvml.nvmlDeviceGetRemappedRows, handle)
    return GpuSample(
        now,
        memory_used=None if memory is None else float(memory.used),
        memory_reserved=None if reserved is None else float(reserved),
        utilization=None if rates is None else rates.gpu / 100,
        power_w=_scaled(_ask(pynvml.nvmlDeviceGetPowerUsage, handle)),
        power_limit_w=_scaled(_ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
        energy_j=_scaled(_ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)),
        temperature_c=_temperature(handle),
        throttle=_throttle(handle),
        ecc_uncorrected=_ecc(handle),
        remapped_rows=None if remapped is None else float(remapped[0] + remapped[1]),
        remap_pending=None if remapped is None else bool(remapped[2]),
        remap_failure=None if remapped is None else bool(remapped[3]),
        processes=_processes(handle),
    )


def _memory(handle: Any, **options: Any) -> Any:
    """Its memory, or None where NVML does not tell it. Raises `_Lost` after any other error."""
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, **options)
    except _NOT_TOLD:
        return None
    except pynvml.NVMLError as error:
        raise _Lost from error


def _pci(handle: Any) -> str | None:
    found = _ask(pynvml.nvmlDeviceGetPciInfo_v3, handle)
    if found is None:
        return None
    # As bytes or as text, by the version of pynvml.
    return found.busId.decode() if isinstance(found.busId, bytes) else str(found.busId)


def _temperature(handle: Any) -> float | None:
    sensor = pynvml.NVML_TEMPERATURE_GPU
    found = _ask(pynvml.nvmlDeviceGetTemperatureV, handle, sensor)
    if found is None:
        found = _ask(pynvml.nvmlDeviceGetTemperature, handle, sensor)
    return None if found is None else float(found)


def _throttle(handle: Any) -> tuple[str, ...] | None:
    mask = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if mask is None:
        mask = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    if mask is None:
        return None
    bits = [1 << i for i in range(mask.bit_length()) if mask & ~_NO_THROTTLE & 1 << i]
    return tuple(_THROTTLE_REASONS.get(bit, f"reason_{bit:#x}") for bit in bits)


def _ecc(handle: Any) -> float | None:
    kind, since = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    found = _ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, kind, since)
    return None if found is None else float(found)


def _processes(handle: Any) -> tuple[GpuProcess, ...] | None:
    found = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
    if found is None:
        found = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v2, handle)
    if found is None:
        return None
    return tuple(GpuProcess(int(p.pid), p.usedGpuMemory) for p in found)


def _instances(handle: Any) -> tuple[int | None, int | None]:
    return (
        _ask(pynvml.nvmlDeviceGetGpuInstanceId, handle),
        _ask(pynvml.nvmlDeviceGetComputeInstanceId, handle),
    )


def _scaled(milli: int | None) -> float | None:
    return None if milli is None else milli / 1000


def _address(handle: Any) -> int:
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)


def _must(call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except pynvml.NVMLError as error:
        raise _Lost from error


def _ask(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What NVML answers, or None where it does not. Raises `_Lost`."""
    try:
        return call(*args, **options)
    except _BROKEN as error:
        raise _Lost from error
    except pynvml.NVMLError:
        return None
