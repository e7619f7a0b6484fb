"""A few threads for jobs that block, now or after a delay. Who submits never waits."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

Job = Callable[[], None]


class Workers:
    """At most `threads` daemon threads, started when there is work, and `limit` waiting jobs."""

    def __init__(self, name: str, *, threads: int, limit: int) -> None:
        self._name = name
        self._most = threads
        self._limit = limit
        self._waiting: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closing = False
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, job: Job, delay_s: float = 0.0) -> bool:
        """Have `job` run after `delay_s`, or return False: too many wait, or it is closed.

        While it closes, jobs may still submit others that are due at once.
        """
        with self._changed:
            refused = self._closed or (self._closing and delay_s > 0)
            if refused or len(self._waiting) >= self._limit:
                return False
            heapq.heappush(self._waiting, (time.monotonic() + delay_s, next(self._numbers), job))
            if self._idle < len(self._waiting) and len(self._threads) < self._most:
                self._start_one()
            self._changed.notify()
        return True

    def close(self, timeout_s: float = 0.0) -> None:
        """Run what is due for at most `timeout_s`, drop the rest, take no more. Blocks so long."""
        give_up = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._closed = timeout_s <= 0
            if self._closed:
                self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        with self._changed:
            self._closed = True
            self._waiting.clear()

    def _start_one(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:  # a bug must not take the thread from the other jobs
                _log.exception("a job of %s failed", self._name)

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                delay = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if delay is not None and delay <= 0:
                    return heapq.heappop(self._waiting)[2]
                if self._closing:
                    return None
                self._idle += 1
                self._changed.wait(delay)
                self._idle -= 1
