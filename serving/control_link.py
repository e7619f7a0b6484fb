"""Calls to the controller: always with a timeout, never fatal when it is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from serving.errors import ClusterError

CONTROLLER_APP: Final = "controller"
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0
_CALL_TIMEOUT_S: Final = 5.0


class ControlLink:
    """The controller's handle, connected on first use and then kept.

    `connect` gives the handle; it may block and may fail while the controller is not there.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._methods: dict[str, Any] = {}
        self._handle: Any = None

    async def call(self, method: str, *args: Any, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        """One call. Raises `ClusterError` if there is no answer within `timeout_s` seconds."""
        try:
            return await asyncio.wait_for(self._call(method, args), timeout_s)
        except TimeoutError:
            raise ClusterError(
                f"the controller did not answer {method} within {timeout_s:g} s"
            ) from None
        except Exception as error:
            # Ray raises many kinds here: no such app, actor died, actor unavailable, the method's
            # own error.
            raise ClusterError(f"the controller failed on {method}: {error}") from error

    async def call_patiently(self, method: str, *args: Any, patience_s: float) -> Any:
        """`call`, repeated with growing pauses until it succeeds or `patience_s` seconds passed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        pause_s = FIRST_BACKOFF_S
        while True:
            try:
                return await self.call(method, *args)
            except ClusterError:
                if loop.time() + pause_s >= deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_BACKOFF_S)

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._handle is None:
            # Looking an app up blocks, and this loop has other things to answer.
            self._handle = await asyncio.to_thread(self._connect)
        # `handle.method` makes a new handle each time, so each is kept.
        bound = self._methods.get(method)
        if bound is None:
            bound = self._methods[method] = getattr(self._handle, method)
        return await bound.remote(*args)
