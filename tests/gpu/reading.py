"""What NVML says through pynvml, apart from the product's own way to read it."""

from __future__ import annotations

import gc
import os

import pynvml

from serving.replica.backends import cuda


class Device:
    """How much the memory in use grew on the GPU that CUDA shows first, since this was made."""

    def __init__(self) -> None:
        # What this process has dropped goes now, not while something else is measured.
        gc.collect()
        pynvml.nvmlInit()
        bare = cuda.identity().bare_uuid
        prefix = "MIG-" if "MIG" in cuda.identity().name else "GPU-"
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}{bare}")
        self._before = self._used()
        # In a container another process may have this one's id for NVML.
        self._mistaken = self._listed()

    def grown_bytes(self) -> int:
        """Right as long as nobody else uses the GPU."""
        return self._used() - self._before

    def knows_this_process(self) -> bool:
        """Whether NVML lists it since CUDA's context was opened, as in a container it may not."""
        return not self._mistaken and self._listed()

    def _listed(self) -> bool:
        try:
            found = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:
            return False
        return any(p.pid == os.getpid() and p.usedGpuMemory is not None for p in found)

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
