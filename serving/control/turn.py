"""Who changes what the store has: one at a time, and knowing what is in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Turn:
    """A lock, for `async with`.

    A write that ends in an error may have been done all the same: the connection was lost while it
    committed, or whoever waited for it was cancelled. After `doubt`, `recall` reads the store
    before the next one has its turn; what it raises is raised there, and is tried again.
    """

    def __init__(self, recall: Callable[[], Awaitable[None]]) -> None:
        self._lock = asyncio.Lock()
        self._recall = recall
        self._in_doubt = False

    def doubt(self) -> None:
        """Nobody knows whether a write was done."""
        self._in_doubt = True

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        try:
            if self._in_doubt:
                await self._recall()
                self._in_doubt = False
        except BaseException:
            self._lock.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
