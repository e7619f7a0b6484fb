"""How long what the ledger charges for has been there, by messages that are late or do not come."""

from __future__ import annotations

from typing import Final

SILENCE_NS: Final = 8 * 10**9
"""Four missed announcements: so long a life is carried on that nobody has heard of."""
_MAX_LATE_NS: Final = 10**9
# Clocks are taken to differ by one part in so many at most.
_MAX_DRIFT: Final = 1000


class Life:
    """How long something has been there, from what it says and when that was heard (monotonic).

    A message that was long on its way says less than is true by then. So the clock goes on as the
    fastest messages have set it, less a little, by which it follows one that runs slower.
    """

    def __init__(self, up_ns: int = 0, *, heard_at: int = 0, told_ns: int = 0) -> None:
        self.up_ns = up_ns
        self.open = True
        self._told_ns, self._heard_at = told_ns, heard_at
        self._late_ns = 0

    @property
    def told_ns(self) -> int:
        """What it said last."""
        return self._told_ns

    def heard(self, told_ns: int, now: int) -> bool:
        """Take what it says; whether that is news, and not a message that came late or twice."""
        if told_ns <= self._told_ns:
            return False
        if self._told_ns and self.open:
            since = now - self._heard_at
            expected = self._told_ns + self._late_ns + since - since // _MAX_DRIFT
            self._late_ns = max(0, min(expected - told_ns, _MAX_LATE_NS))
        self._told_ns, self._heard_at, self.open = told_ns, now, True
        return True

    def silent(self, now: int) -> bool:
        """Whether it has not been heard of for `SILENCE_NS`."""
        return now - self._heard_at >= SILENCE_NS

    def close(self) -> None:
        """It is gone: what it said last was its life."""
        self.open = False
        self._late_ns = 0

    def conclude(self, now: int) -> None:
        """Nobody will hear more of it: what it is thought to be is what it was."""
        if self.open:
            self._told_ns, self._heard_at = max(self._told_ns, self.at(now)), now

    def at(self, now: int, least: int = 0) -> int:
        """How long it has been there by `now`, `least` or more: never less than before if open."""
        if not self.open:
            return max(self._told_ns, least)
        since = max(0, min(now - self._heard_at, SILENCE_NS)) + self._late_ns
        return max(self.up_ns, self._told_ns + since, least)
