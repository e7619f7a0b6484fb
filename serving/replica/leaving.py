"""The end of a replica's process from inside: at once, with a reason, whatever hangs."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, NoReturn

from serving.replica.backends.faults import FatalDeviceError

EXIT_STALLED: Final = 70
EXIT_DEVICE: Final = 71
_LIMIT_S: Final = 1.0

_log = logging.getLogger(__name__)


def leave(reason: str, status: int) -> NoReturn:
    """End the process with `status`. Sockets close, so that gateways turn to other replicas."""
    _log.critical("this replica exits: %s", reason)
    logging.shutdown()
    os._exit(status)


class LastWords:
    """What a replica does when its GPU is of no more use: tell the controller, and leave.

    `stop` closes the sockets: gateways send what is in flight to another replica at once. `tell`
    makes the call that tells the controller, on `loop`. The process has ended after a second,
    whatever they do.
    """

    def __init__(
        self,
        stop: Callable[[], None],
        tell: Callable[[FatalDeviceError], Coroutine[Any, Any, None]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._stop = stop
        self._tell = tell
        self._loop = loop
        self._first = threading.Lock()

    def __call__(self, error: FatalDeviceError) -> NoReturn:
        """End the process. Called on any thread but the loop's."""
        if not self._first.acquire(blocking=False):
            # Another thread is at it, and takes this one along.
            threading.Event().wait()
        limit = threading.Timer(_LIMIT_S, os._exit, (EXIT_DEVICE,))
        limit.daemon = True
        limit.start()
        # Leaving must not fail, whatever state the process is in.
        with suppress(Exception):
            self._stop()
            asyncio.run_coroutine_threadsafe(self._tell(error), self._loop).result(_LIMIT_S)
        leave(str(error), EXIT_DEVICE)
