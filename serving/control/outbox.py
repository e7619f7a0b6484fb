"""Notices on their way to webhooks: in order for each receiver, again after a failure, bounded."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Final

from serving.control.notices import Notice
from serving.control.outbound import NoAnswer
from serving.control.webhooks import Receiver, Undeliverable, tell
from serving.control.workers import Workers
from serving.core.urls import place

_log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Pauses between the tries of one notice."""
_WAITING: Final = 256
"""Notices that wait for one receiver at most; a newer one is dropped."""

_STOPS: Final = "the controller stops"


class Outbox:
    """Delivers notices on threads of its own; `put` never blocks.

    A notice waits for those before it to the same receiver, so that receivers see a rollout's
    transitions in order. One that cannot be delivered is logged and given up.
    """

    def __init__(self, retry_after_s: Sequence[float] = RETRY_AFTER_S) -> None:
        self._retry_after_s = tuple(retry_after_s)
        self._workers = Workers("webhook-notices", threads=4, limit=1024)
        self._lock = threading.Lock()
        self._queues: dict[Receiver, deque[Notice]] = {}
        self._closing = False

    def put(self, receiver: Receiver, notice: Notice) -> None:
        """Have `notice` delivered."""
        if self._closing:
            _given_up(receiver, notice, _STOPS)
            return
        with self._lock:
            queue = self._queues.setdefault(receiver, deque())
            first = not queue
            full = len(queue) >= _WAITING
            if not full:
                queue.append(notice)
        if full:
            _given_up(receiver, notice, f"{_WAITING} earlier ones wait")
        elif first:
            self._continue(receiver, tries=0)

    def close(self, timeout_s: float) -> None:
        """Deliver what is due for at most `timeout_s`; what is left is logged. Blocks so long."""
        self._closing = True
        self._workers.close(timeout_s)
        with self._lock:
            left = dict(self._queues)
            self._queues.clear()
        for receiver, queue in left.items():
            for notice in queue:
                _given_up(receiver, notice, _STOPS)

    def _continue(self, receiver: Receiver, tries: int, delay_s: float = 0.0) -> None:
        if not self._workers.submit(partial(self._deliver, receiver, tries), delay_s):
            with self._lock:
                dropped = self._queues.pop(receiver, deque())
            for notice in dropped:
                _given_up(receiver, notice, _STOPS if self._closing else "too many wait")

    def _deliver(self, receiver: Receiver, tries: int) -> None:
        with self._lock:
            queue = self._queues.get(receiver)
            notice = queue[0] if queue else None
        if notice is None:
            return
        try:
            tell(receiver, notice)
        except NoAnswer as error:
            if tries < len(self._retry_after_s):
                self._continue(receiver, tries + 1, self._retry_after_s[tries])
                return
            _given_up(receiver, notice, f"{error} ({tries + 1} tries)")
        except Undeliverable as error:
            _given_up(receiver, notice, str(error))
        except Exception:  # a bug must not hold back the notices behind this one
            _log.exception("rollout %s: a notice could not be sent", notice.rollout.id)
        self._finished(receiver)

    def _finished(self, receiver: Receiver) -> None:
        with self._lock:
            queue = self._queues.get(receiver)
            if queue:
                queue.popleft()
            more = bool(queue)
            if not more:
                self._queues.pop(receiver, None)
        if more:
            self._continue(receiver, tries=0)


def _given_up(receiver: Receiver, notice: Notice, why: str) -> None:
    _log.warning(
        "rollout %s: a notice to %s was given up, %s: %s",
        notice.rollout.id,
        place(receiver.url),
        why,
        notice.message,
    )
