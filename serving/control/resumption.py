"""What a controller that was restarted waits for, before it goes by what it sees."""

from __future__ import annotations

from typing import Final

from serving.control.reconcile import REANNOUNCE_WAIT_S, Clock
from serving.control.totals import Totals
from serving.core.routing import RouteTable

REPORT_WAIT_TICKS: Final = 4


class Resumption:
    """The replicas and the gateways of before, which are heard again or given up."""

    def __init__(self, clock: Clock, tick_s: float) -> None:
        self._clock, self._tick_s = clock, tick_s
        self._awaited: set[str] = set()
        self.started = clock.monotonic()
        self._resumed = False

    def resume(self, table: RouteTable, *, resumed: bool) -> None:
        """Wait for the replicas of the table; where a state was `resumed`, for gateways too."""
        self._resumed = resumed
        self._awaited = {
            e.replica for m in table.models.values() for a in m.arms.values() for e in a.endpoints
        }

    def heard(self, replica: str) -> bool:
        """A replica has announced itself; whether it was the last that was waited for."""
        if not self._awaited:
            return False
        self._awaited.discard(replica)
        return not self._awaited

    @property
    def may_act(self) -> bool:
        """After a restart, first hear the stored table's replicas: else they'd leave the routes."""
        return not self._awaited or self._clock.monotonic() - self.started > REANNOUNCE_WAIT_S

    def totals_are_current(self, totals: Totals) -> bool:
        """Whether what the store has of the gateways is overtaken by their own reports.

        Stored totals are up to a tick old. To show them after a restart would let counters go
        backwards, which a reader of counters takes for a restart of everything that was counted.
        """
        waited = self._clock.monotonic() - self.started
        patience = REPORT_WAIT_TICKS * max(1.0, self._tick_s)
        return not (self._resumed and totals.unheard) or waited > patience
