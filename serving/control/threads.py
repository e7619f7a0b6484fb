"""Threads for blocking calls, so that none of them holds up the loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving.control.reconcile import Blocking
from serving.errors import ClusterError


def one_thread(name: str, timeout_s: float | None = None) -> Blocking:
    """A thread that does one blocking call after the other.

    Raises `ClusterError` after a timeout: the call goes on, what was queued behind it does not.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(call: Any, *args: Any) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(pool, call, *args)
        except TimeoutError:
            raise ClusterError(f"the {name} did not answer within {timeout_s:g} s") from None

    return run
