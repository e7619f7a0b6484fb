"""A gateway's own judgement of a canary: after a burst of failures it stops sending to it.

The controller needs evidence and a tick for its verdict; this needs neither. It is no verdict: the
breaker lets a request through again after a while, and the controller is told that it opened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

RETRY_S: Final = 5.0


class Breaker:
    """Opens after `limit` failed batches in a row. `opened` is called each time."""

    __slots__ = (
        "_clock",
        "_in_a_row",
        "_limit",
        "_opened",
        "_opened_at",
        "_retry_at",
        "open",
        "openings",
    )

    def __init__(self, limit: int, clock: Callable[[], float], opened: Callable[[], None]) -> None:
        self._limit = limit
        self._clock = clock
        self._opened = opened
        self._in_a_row = 0
        self._opened_at = self._retry_at = 0.0
        # Whether requests are kept from the canary.
        self.open = False
        self.openings = 0

    def lets_through(self) -> bool:
        """Whether a request may go to the canary while it is open: one every `RETRY_S` seconds."""
        now = self._clock()
        if now < self._retry_at:
            return False
        self._retry_at = now + RETRY_S
        return True

    def succeeded(self, sent: float) -> None:
        """A batch that was sent then was answered."""
        if self.open and sent < self._opened_at:
            # How the canary was before it says nothing of how it is.
            return
        self._in_a_row = 0
        self.open = False

    def failed(self) -> None:
        """A batch failed."""
        self._in_a_row += 1
        if self._in_a_row >= self._limit and not self.open:
            self.open = True
            self._opened_at = self._clock()
            self._retry_at = self._opened_at + RETRY_S
            self.openings += 1
            self._opened()
