"""XID errors as they happen: one thread that blocks in NVML."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, Protocol

from serving.core.gpus import XidEvent
from serving.errors import DeviceError

_WAIT_S: Final = 0.5
_PAUSE_S: Final = 1.0

_log = logging.getLogger(__name__)


class XidSource(Protocol):
    """What reports XID errors; see `serving.agent.nvml.Nvml`."""

    def watch(self) -> bool:
        """Begin to listen; whether any GPU reports them."""

    def next_xid(self, timeout_s: float) -> XidEvent | None:
        """The next one, or None after `timeout_s`. Blocks. Raises `DeviceError`."""


class XidWatcher:
    """Gives every XID error of `source` to `tell`, on a thread of its own."""

    def __init__(self, source: XidSource, tell: Callable[[XidEvent], None]) -> None:
        self._source = source
        self._tell = tell
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xid-events", daemon=True)

    def start(self) -> None:
        """Begin. From here on no error is missed."""
        if self._source.watch():
            self._thread.start()
        else:
            _log.warning("no GPU of this node reports XID errors")

    def stop(self) -> None:
        """End, within half a second."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                event = self._source.next_xid(_WAIT_S)
            except DeviceError as error:
                # As after a GPU fell off the bus: it may fail at once, again and again.
                _log.warning("%s", error)
                self._stopped.wait(_PAUSE_S)
                continue
            if event is not None:
                _log.warning("GPU %s: %s", event.uuid, event.sentence)
                self._tell(event)
