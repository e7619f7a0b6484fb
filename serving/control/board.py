"""The published route table and the gateways that wait for the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from serving.core.routing import RouteTable


class RouteBoard:
    """Holds one table; `poll` is a long-poll. Lives on the controller's loop."""

    def __init__(self, table: RouteTable) -> None:
        self._changed = asyncio.Event()
        self._set(table)

    def _set(self, table: RouteTable) -> None:
        self.table = table
        self.plain: Mapping[str, Any] = table.to_dict()

    @property
    def revision(self) -> int:
        """Of the published table; 0 before the first."""
        return self.table.revision

    def publish(self, table: RouteTable) -> None:
        """Replace the table and wake every poll."""
        self._set(table)
        self._changed.set()
        self._changed = asyncio.Event()

    def differs(self, table: RouteTable) -> bool:
        """Whether `table` routes differently, whatever its revision."""
        return {**table.to_dict(), "revision": 0} != {**self.plain, "revision": 0}

    async def poll(self, revision: int, timeout_s: float) -> Mapping[str, Any] | None:
        """The table once it is newer than `revision`, or None after `timeout_s`."""
        if self.revision <= revision:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return None
        return self.plain if self.revision > revision else None
