"""Ends the process when a run hangs or when the process that started it is gone.

A hung kernel or a deadlocked operator cannot be cancelled from Python. The process leaves at once,
with every socket closed, so that the gateway sends its batches to another replica and Serve starts
a new one.
"""

from __future__ import annotations

import os
import threading

from serving.replica.engine import Engine
from serving.replica.leaving import EXIT_STALLED, leave


class Watchdog:
    """Checks `engine` a few times per `stall_timeout_s` (seconds) from its own thread."""

    def __init__(self, engine: Engine, stall_timeout_s: float) -> None:
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        self._parent = os.getppid()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="replica-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        period_s = min(1.0, self._stall_timeout_s / 10)
        while not self._stopped.wait(period_s):
            stalled_s = self._engine.stalled_s
            if stalled_s > self._stall_timeout_s:
                leave(
                    f"a run of the model has lasted {stalled_s:.1f} s, "
                    f"stall_timeout_s is {self._stall_timeout_s:g}",
                    EXIT_STALLED,
                )
            if os.getppid() != self._parent:
                leave("the process that started this replica is gone", EXIT_STALLED)
