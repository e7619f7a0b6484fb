"""What the CUDA driver itself says of this process's GPU, without any runtime in between.

ONNX Runtime answers a missing GPU with a log line and the CPU, torch with an exception deep in a
call; the driver itself answers at once and says why. The same holds for a context that is broken.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from serving.errors import DeviceError

_WHAT_TO_DO = "run this replica on a node with a GPU, or set `device: cpu` (or `auto`)"
_OUT_OF_MEMORY: Final = 2
# The oldest driver that runs what was built for any minor version of this CUDA.
_OLDEST_DRIVER: Final = {12: 525, 13: 580}
_UUID_BYTES: Final = 16
_NAME_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Identity:
    """The first device that this process sees. `bare_uuid` lacks the prefix GPU- or MIG-."""

    bare_uuid: str
    name: str


def require_cuda(asked: str) -> None:
    """Raise `DeviceError` unless the driver shows a device; `asked` is the setting at fault."""
    if reason := missing_cuda():
        raise DeviceError(f"{asked}: {reason}; {_WHAT_TO_DO}")


def require_driver(asked: str, runtime: str, built: str | None) -> None:
    """Raise `DeviceError` where the driver is too old; see `old_driver`."""
    if reason := old_driver(runtime, built):
        raise DeviceError(f"{asked}: {reason}; update the driver, or set `device: cpu`")


def old_driver(runtime: str, built: str | None) -> str | None:
    """Why the driver cannot run what `runtime` is built for, as "13.0"; None where it can.

    A driver that is too old starts and shows its devices all the same.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if not built or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    wanted = int(built.partition(".")[0])
    if version.value // 1000 >= wanted:
        return None
    oldest = _OLDEST_DRIVER.get(wanted)
    return (
        f"the NVIDIA driver supports CUDA {version.value // 1000}.{version.value % 1000 // 10}; "
        f"{runtime} is built for CUDA {built}, which needs "
        + (f"driver {oldest} or newer" if oldest else "a newer driver")
    )


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


def identity() -> Identity:
    """The device that runtimes call cuda:0. Raises `DeviceError` where the driver does not tell."""
    driver, device = _first_device()
    raw, name = (ctypes.c_ubyte * _UUID_BYTES)(), ctypes.create_string_buffer(_NAME_BYTES)
    # The second version names the MIG device, not the GPU that it is a part of.
    _check(driver, driver.cuDeviceGetUuid_v2(raw, device))
    _check(driver, driver.cuDeviceGetName(name, _NAME_BYTES, device))
    return Identity(str(uuid.UUID(bytes=bytes(raw))), name.value.decode())


def open_context() -> None:
    """Make the context that every runtime of this process shares, and keep it.

    Raises `DeviceError` where it cannot be made.
    """
    driver, device = _first_device()
    _check(driver, driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), device))


def context_fault() -> str | None:
    """Why this process's context can do nothing more, None where it works.

    A context that met an illegal access, a failed assertion or an uncorrectable memory error
    answers each later call with that error. The call made here waits for no kernel.
    """
    try:
        with _context() as driver:
            code, _ = _memory(driver)
            return None if code in (0, _OUT_OF_MEMORY) else _description(driver, code)
    except DeviceError as error:
        return str(error)


def free_bytes() -> int | None:
    """How much memory is free on the device; None where the driver does not tell."""
    try:
        with _context() as driver:
            code, free = _memory(driver)
            return None if code else free
    except DeviceError:
        return None


def _memory(driver: Any) -> tuple[int, int]:
    """CUDA's error code, and the bytes that are free."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    return driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), free.value


@contextmanager
def _context() -> Iterator[Any]:
    """The driver, with this process's context current on this thread."""
    driver, device = _first_device()
    context = ctypes.c_void_p()
    _check(driver, driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    try:
        _check(driver, driver.cuCtxPushCurrent_v2(context))
        try:
            yield driver
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _first_device() -> tuple[Any, ctypes.c_int]:
    if reason := missing_cuda():
        raise DeviceError(reason)
    driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    _check(driver, driver.cuDeviceGet(ctypes.byref(device), 0))
    return driver, device


def _check(driver: Any, code: int) -> None:
    if code:
        raise DeviceError(_description(driver, code))


def _description(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} (CUDA error {code})"
