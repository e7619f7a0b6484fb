"""The device time behind what a gateway answered: totals by replica, tenant and kind.

Totals since a counter began, so a report that is lost loses nothing. Plain integers, a few a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, Final

from serving.tenant_settings import DEFAULT_TENANT

# How long after a replica has left its last totals are repeated.
_KEEP_S: Final = 60.0

DIRECT: Final = "direct"
FAILED: Final = "failed"
SHADOW: Final = "shadow"
NOBODY: Final = ""


class _Counter:
    """One replica's totals: [nanoseconds, requests] by (tenant, kind)."""

    __slots__ = ("began", "left_at", "totals")

    def __init__(self, began: int) -> None:
        self.began = began
        self.left_at = 0.0
        self.totals: dict[tuple[str, str], list[int]] = {}


class UsageMeter:
    """What one version's replicas ran for this gateway.

    `tenant` is the only one that there is; None if requests say whose they are.
    """

    __slots__ = ("_counters", "_monotonic", "tenant")

    def __init__(
        self,
        tenant: str | None = DEFAULT_TENANT,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tenant = tenant
        self._counters: dict[str, _Counter] = {}
        self._monotonic = monotonic

    def add(self, replica: str, tenant: str, kind: str, ns: int, requests: int) -> None:
        """Count a part of a run."""
        counter = self._counters.get(replica)
        if counter is None:
            # Another life of the same name counts from 0 again: told apart by when it began.
            counter = self._counters[replica] = _Counter(time.time_ns())
        total = counter.totals.get((tenant, kind))
        if total is None:
            counter.totals[tenant, kind] = [ns, requests]
        else:
            total[0] += ns
            total[1] += requests

    def report(self) -> list[dict[str, Any]]:
        """Totals by replica, in plain JSON types."""
        return [
            {
                "replica": replica,
                "began": counter.began,
                "rows": [[*source, *total] for source, total in counter.totals.items()],
            }
            for replica, counter in self._counters.items()
        ]

    def forget(self, there: Collection[str]) -> None:
        """After a report was heard: forget replicas that left a minute ago; `there` are here."""
        now = self._monotonic()
        for replica, counter in list(self._counters.items()):
            if replica in there:
                counter.left_at = 0.0
            elif not counter.left_at:
                counter.left_at = now
            elif now - counter.left_at > _KEEP_S:
                del self._counters[replica]
