"""Measures a node's GPUs once a second, on one thread: NVML calls can take long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from serving.agent.energy import PowerIntegral
from serving.core.gpus import Gpu, GpuSample
from serving.errors import DeviceError

PERIOD_S: Final = 1.0

_log = logging.getLogger(__name__)

Readings = tuple[tuple[Gpu, GpuSample], ...]


class GpuSource(Protocol):
    """What knows the GPUs; see `serving.agent.nvml.Nvml`."""

    def gpus(self) -> list[Gpu]:
        """Every GPU. Raises `DeviceError`."""

    def sample(self, gpu: Gpu) -> GpuSample:
        """What is measured on it now."""


class Poller:
    """Gives the readings of all GPUs of `source` to `tell` every `period_s` seconds."""

    def __init__(
        self, source: GpuSource, tell: Callable[[Readings], None], period_s: float = PERIOD_S
    ) -> None:
        self._source = source
        self._tell = tell
        self._period_s = period_s
        self._energy = PowerIntegral()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-poller", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it goes on measuring."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End, after the measurement that runs."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            # A slow measurement delays the next, and none is made up for.
            due = max(due, time.monotonic()) + self._period_s
            try:
                self._tell(tuple((gpu, self._sample(gpu)) for gpu in self._source.gpus()))
            except DeviceError as error:
                _log.warning("%s", error)

    def _sample(self, gpu: Gpu) -> GpuSample:
        sample = self._source.sample(gpu)
        return self._energy.added(gpu, sample, time.monotonic())
