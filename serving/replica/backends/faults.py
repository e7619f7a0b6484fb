"""What a runtime's error means for the process: out of memory, a broken GPU context, or neither.

Runtimes have a class of their own for few of these, so the words decide, as the runtimes write
them; for a context, CUDA itself is asked as well. An error that CUDA has forgotten by the next call
is the model's failure. One that it repeats will fail every run until the process ends.
"""

from __future__ import annotations

import re
from typing import Final

from serving.errors import DeviceError, InvalidRequest
from serving.replica.backends.cuda import context_fault, free_bytes

_UNITS: Final = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# Where it names the bytes that were asked for, they are the pattern's first group.
_OUT_OF_MEMORY: Final = tuple(
    re.compile(pattern)
    for pattern in (
        # ONNX Runtime's arena, without and with gpu_mem_limit, and its other allocators.
        r"Failed to allocate memory for requested buffer of size (\d+)",
        r"Available memory of \d+ is smaller than requested bytes of (\d+)",
        r"cudaMallocFromPoolAsync failed",
        r"std::bad_alloc",
        # torch, on a GPU and on a CPU.
        r"out of memory\. Tried to allocate ([\d.]+ (?:bytes|KiB|MiB|GiB))",
        r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory): "
        r"you tried to allocate (\d+) bytes",
        # CUDA and its libraries, whoever calls them.
        r"CUDA\w* (?:error|failure).*?out of memory",
        r"CUDA out of memory",
        r"CU(?:BLAS|DNN|FFT)_(?:STATUS_)?\w*ALLOC\w*FAILED",
        r"CUBLAS failure 3:",
    )
)
# torch's convolutions try one engine after the other, also past those that got no memory; in the
# end they say the same of memory that is short as of what cuDNN cannot do.
_NO_ENGINE: Final = re.compile(r"unable to find an engine to execute this computation")
# What a library's handle needs comes from the GPU itself, past every allocator; none is left for it
# when less than this is free.
_NO_HANDLE: Final = re.compile(r"CU(?:BLAS|DNN)_STATUS_NOT_INITIALIZED|expr=cu(?:blas|dnn)Create\(")
_HANDLE_BYTES: Final = 128 << 20
_CUDA: Final = re.compile(r"\b(?:CUDA|CUDNN|cuDNN|CUBLAS|CUFFT)\w* (?:error|failure|ERROR)")
# After these every later call of the process fails.
_STICKY: Final = re.compile(
    r"illegal memory access|device-side assert|launch failure|launch timed out"
    r"|[Uu]ncorrectable (?:ECC|NVLink) error|misaligned address|illegal instruction"
    r"|invalid program counter|hardware stack error|global/shared address space"
    r"|GPU is lost|device is lost"
)
# What torch.export found to hold of the shapes, but for the number of rows: that is ours.
_SHAPE_GUARD: Final = re.compile(r"Guard failed: (.*\.size\(\)\[[1-9]\d*\].*)")


class MemoryExhausted(Exception):
    """A run or an allocation did not fit into memory.

    `requested_bytes` is what the failed allocation asked for, where the runtime told.
    """

    def __init__(self, requested_bytes: int | None = None) -> None:
        super().__init__("out of memory")
        self.requested_bytes = requested_bytes


class FatalDeviceError(DeviceError):
    """The GPU can do nothing more for this process, which must end."""


def meaning(
    error: Exception, device: str, *, refused: bool = False
) -> MemoryExhausted | FatalDeviceError | None:
    """What a runtime's error on `device` means; None where it is a failure like any other.

    `refused`: the runtime counted an allocation that it refused, whatever the error says.
    """
    text = str(error)
    if (exhausted := _exhausted(error, text)) is not None:
        return exhausted
    if refused and _NO_ENGINE.search(text):
        return MemoryExhausted()
    if device == "cpu":
        return None
    if _NO_HANDLE.search(text) and (free := free_bytes()) is not None and free < _HANDLE_BYTES:
        return MemoryExhausted()
    reason = context_fault()
    if reason is None and _CUDA.search(text) and _STICKY.search(text):
        reason = next(line for line in text.splitlines() if _STICKY.search(line)).strip()[:300]
    if reason is None:
        return None
    return FatalDeviceError(f"{device} can run nothing more in this process: {reason}")


def _exhausted(error: Exception, text: str) -> MemoryExhausted | None:
    for pattern in _OUT_OF_MEMORY:
        if found := pattern.search(text):
            return MemoryExhausted(_bytes(found[1]) if pattern.groups else None)
    return MemoryExhausted() if isinstance(error, MemoryError) else None


def _bytes(size: str) -> int:
    number, _, unit = size.partition(" ")
    return int(float(number) * _UNITS[unit]) if unit else int(number)


def refused_shape(error: Exception) -> InvalidRequest | None:
    """The request's fault, where an exported program says that its shapes were never meant."""
    found = _SHAPE_GUARD.match(str(error)) if isinstance(error, AssertionError) else None
    if found is None:
        return None
    return InvalidRequest(f"the model takes only inputs of which {found[1]} holds")
