"""Whether this process can see a CUDA device, asked of the driver before any runtime is loaded.

ONNX Runtime answers a missing GPU with a log line and the CPU, torch with an exception deep in a
call; the driver itself answers at once and says why.
"""

from __future__ import annotations

import ctypes
import os

from serving.errors import DeviceError

_WHAT_TO_DO = "run this replica on a node with a GPU, or set `device: cpu` (or `auto`)"


def require_cuda(asked: str) -> None:
    """Raise `DeviceError` unless the driver shows a device; `asked` is the setting at fault."""
    if reason := missing_cuda():
        raise DeviceError(f"{asked}: {reason}; {_WHAT_TO_DO}")


def refused_by_runtime(asked: str, runtime: str, detail: str) -> DeviceError:
    """The error of a runtime that cannot use the GPU that is there."""
    return DeviceError(
        f"{asked}: {runtime} cannot use the GPU: {detail}; install the CUDA 13 and cuDNN 9 "
        "libraries that it needs (`serving doctor` tells), or set `device: cpu`"
    )


def missing_cuda() -> str | None:
    """None if a CUDA device is visible, else why not: asks the driver API's cuInit and count."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed here (libcuda.so.1 was not found)"
    if code := driver.cuInit(0):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden in ("", "-1"):
            return "CUDA_VISIBLE_DEVICES hides every GPU from this process"
        return f"the NVIDIA driver does not start (CUDA error {code})"
    count = ctypes.c_int(0)
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver cannot count its devices (CUDA error {code})"
    return None if count.value > 0 else "the NVIDIA driver shows no device to this process"
