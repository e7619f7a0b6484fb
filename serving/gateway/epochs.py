"""The epochs of a rollout at a gateway: their counts, until the controller has the last of them.

The controller keeps what it was told of an epoch for as long as the rollout goes on, so a gateway
tells only of the epoch in force and of those in which something may still be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Final

from serving.gateway.trials import CANARY, STABLE, Trial

if TYPE_CHECKING:
    from serving.gateway.splitter import Splitter

KEEP_S: Final = 60.0
"""How long the last counts of an epoch are repeated, until the controller has surely saved them."""


class Epochs:
    """The trials of a split by epoch: stable's and the canary's."""

    __slots__ = ("_idle", "_splitter", "_trials", "current")

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter
        self._trials: dict[int, tuple[Trial, Trial]] = {}
        # Those in which nothing was on its way any more, and when that was seen.
        self._idle: dict[int, float] = {}
        self.current = -1

    def begin(self, epoch: int) -> tuple[Trial, Trial]:
        """Its trials, (stable's, the canary's); it is the one in force now."""
        self.current = epoch
        rollout = self._splitter.rollout
        if epoch not in self._trials:
            stable = Trial(self._splitter, rollout, epoch, STABLE)
            self._trials[epoch] = stable, Trial(self._splitter, rollout, epoch, CANARY)
        return self._trials[epoch]

    def heard(self, busy: Callable[[], Collection[int]], window_s: float, now: float) -> set[int]:
        """After a report was heard: forget the epochs that are over, and return them.

        `busy` finds the epochs with requests on their way; `window_s` after an answer its label may
        still come.
        """
        past = self._trials.keys() - {self.current}
        if not past <= self._idle.keys():
            for epoch in past - self._idle.keys() - set(busy()):
                self._idle[epoch] = now
        over = {e for e in past if now - self._idle.get(e, now) > KEEP_S + window_s}
        for epoch in over:
            del self._trials[epoch], self._idle[epoch]
        return over

    def report(self) -> Iterator[dict[str, Any]]:
        """The counts of every epoch, a row an arm and replica."""
        for trials in self._trials.values():
            for trial in trials:
                yield from trial.report()
