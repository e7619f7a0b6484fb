"""torch's side of the GPU: whether it can use it, how much memory it may take, and what it took."""

from __future__ import annotations

import logging

from serving.replica.backends.base import RuntimeOptions, allocator_limit
from serving.replica.backends.cuda import (
    missing_cuda,
    old_driver,
    refused_by_runtime,
    require_cuda,
    require_driver,
)
from serving.replica.backends.meters import DriverMeter, Meter

_log = logging.getLogger(__name__)


def choose_device(options: RuntimeOptions) -> str:
    """The device, cpu or cuda:0. Raises `DeviceError` where torch cannot use the one asked for."""
    import torch

    built = torch.version.cuda
    if options.device == "cuda":
        require_cuda("device: cuda")
        require_driver("device: cuda", "torch", built)
    elif options.device == "cpu" or missing_cuda():
        return "cpu"
    reason = old_driver("torch", built)
    if reason is None and torch.cuda.is_available():
        return "cuda:0"
    detail = "this build of torch has no CUDA" if built is None else "it finds no device"
    if options.device == "cuda":
        raise refused_by_runtime("device: cuda", "torch", detail)
    _log.warning("%s: running on the CPU", reason or f"a GPU is there, but not for torch: {detail}")
    return "cpu"


class TorchMeter(DriverMeter):
    """As the driver sees it, with the peaks that torch's own allocator remembers."""

    def peak_bytes(self) -> int:
        """See `Meter.peak_bytes`."""
        import torch

        given_back = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
        return self.held_bytes() + int(given_back)

    def restart(self) -> None:
        """See `Meter.restart`."""
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def limit_allocator(meter: Meter) -> None:
    """Cap torch's allocator. Raises `DeviceError` if there is nothing left for it."""
    import torch

    limit = allocator_limit(meter)
    if limit is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), 0)


def refusals() -> int:
    """How often torch's allocator has refused memory in this process."""
    import torch

    return int(torch.cuda.memory_stats().get("num_ooms", 0))
