"""A GPU that is not there, behind the ports of the engine: a backend and a meter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from serving.core.types import Batch, Signature, TensorSpec
from serving.replica.backends.faults import FatalDeviceError, MemoryExhausted

VECTOR = Signature(
    (TensorSpec("x", "FP32", (-1, -1)),), (TensorSpec("y", "FP32", (-1, -1)),), Batch.DYNAMIC
)
MIB = 1 << 20
BREAKS = -1000


class FakeMeter:
    """A runtime that keeps what it allocated until `restart`, like torch's allocator."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.uuid = "GPU-0"
        self.device_type = "Fake GPU"
        self.limit_bytes = limit_bytes
        self.exact = True
        self.context_bytes = 300 * MIB
        self.fixed_bytes = 300 * MIB
        self.cached_bytes = 0

    def held_bytes(self) -> int:
        return self.fixed_bytes + self.cached_bytes

    def peak_bytes(self) -> int:
        return self.held_bytes()

    def restart(self) -> None:
        self.cached_bytes = 0


class FakeGpu:
    """y = 2x. A run of more than `capacity` bytes of input does not fit.

    `shapes` is what was tried, `fitted` what fitted. The value `BREAKS` breaks the device for good.
    """

    platform, device, precision = "test", "cuda:0", "FP32"

    def __init__(
        self,
        capacity: float = np.inf,
        signature: Signature = VECTOR,
        meter: FakeMeter | None = None,
    ) -> None:
        self.signature = signature
        self.capacity = capacity
        self.meter = meter or FakeMeter()
        self.fault: Exception | None = None
        self.on_run: Callable[[np.ndarray], None] = lambda x: None
        self.shapes: list[tuple[int, ...]] = []
        self.fitted: list[tuple[int, ...]] = []

    @property
    def tried(self) -> list[int]:
        """The rows of every run."""
        return [shape[0] for shape in self.shapes]

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        (x,) = inputs
        self.shapes.append(x.shape)
        self.on_run(x)
        if (x == BREAKS).any():
            raise FatalDeviceError("cuda:0 can run nothing more in this process: an illegal access")
        if x.nbytes > self.capacity:
            raise MemoryExhausted(x.nbytes)
        self.fitted.append(x.shape)
        return [x * 2]

    def check(self) -> None:
        if self.fault is not None:
            raise self.fault

    def close(self) -> None:
        pass
