"""How much of a GPU's memory this process holds.

What counts for a neighbour on the GPU is all that the process holds: CUDA's context, kernels and
library handles as well as what a runtime allocates, and what it keeps for later. Only the driver's
management library (NVML) sees all of it, so that is what is read, through ctypes: this process
needs four of its functions.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final, Protocol

from serving.errors import DeviceError
from serving.replica.backends import cuda

_UUID_PREFIXES: Final = ("GPU-", "MIG-")
_MAX_PROCESSES: Final = 256
_NOT_AVAILABLE: Final = 2**64 - 1


class Meter(Protocol):
    """The memory that this process holds on its GPU, in bytes.

    `limit_bytes` is the most that it may hold, None where nobody set a limit; `context_bytes` what
    it held before it loaded anything. `exact`: no other process's memory is in the readings.
    """

    uuid: str
    device_type: str
    limit_bytes: int | None
    context_bytes: int
    exact: bool

    def held_bytes(self) -> int:
        """What it holds now. Raises `DeviceError` where the driver does not tell."""

    def peak_bytes(self) -> int:
        """The most that it held since `restart`."""

    def restart(self) -> None:
        """Give back what is kept for later, as far as the runtime can, and forget the peak."""


class DriverMeter:
    """NVML's reading of this process or, where NVML does not see it, of what it added to the GPU.

    NVML may not know the process of a container by its id, and another one may have that id for it:
    only one that appears with the context is this one. Where none does, what the GPU's memory grew
    by since this meter was made stands in, which is right as long as no neighbour grows meanwhile.
    A runtime that gives nothing back between runs, as ONNX Runtime's arena, holds its peak.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        found = cuda.identity()
        self.device_type = found.name
        self.limit_bytes = limit_bytes
        self._library, self._device, self.uuid = _open(found.bare_uuid)
        self._before = self._used_on_device()
        mistaken = self._used_by_process() is not None
        cuda.open_context()
        self.exact = not mistaken and self._used_by_process() is not None
        self.context_bytes = self.held_bytes()

    def held_bytes(self) -> int:
        """See `Meter.held_bytes`."""
        if self.exact:
            if (used := self._used_by_process()) is None:
                raise DeviceError(
                    f"NVML does not tell any more what this process holds of {self.uuid}"
                )
            return used
        return max(0, self._used_on_device() - self._before)

    def peak_bytes(self) -> int:
        """See `Meter.peak_bytes`."""
        return self.held_bytes()

    def restart(self) -> None:
        """See `Meter.restart`."""

    def _used_on_device(self) -> int:
        memory = _Memory()
        self._check(self._library.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)))
        return int(memory.used)

    def _used_by_process(self) -> int | None:
        count, processes = ctypes.c_uint(_MAX_PROCESSES), (_Process * _MAX_PROCESSES)()
        code = self._library.nvmlDeviceGetComputeRunningProcesses_v3(
            self._device, ctypes.byref(count), processes
        )
        if code:
            return None
        mine = [p.used for p in processes[: count.value] if p.pid == os.getpid()]
        return None if not mine or mine[0] == _NOT_AVAILABLE else int(mine[0])

    def _check(self, code: int) -> None:
        if code:
            raise DeviceError(f"the memory of {self.uuid} cannot be read (NVML error {code})")


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


def _open(bare_uuid: str) -> tuple[Any, ctypes.c_void_p, str]:
    """The library, its handle of the device and the device's whole UUID."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise DeviceError(
            "a GPU is used but libnvidia-ml.so.1, which comes with its driver, is not there"
        ) from error
    if code := library.nvmlInit_v2():
        raise DeviceError(f"NVML does not start (NVML error {code})")
    for prefix in _UUID_PREFIXES:
        name, device = f"{prefix}{bare_uuid}", ctypes.c_void_p()
        if not library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(device)):
            return library, device, name
    raise DeviceError(f"NVML does not know the device {bare_uuid} that CUDA shows")
