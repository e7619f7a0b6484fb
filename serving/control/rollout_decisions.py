"""What becomes of one rollout in a tick: whether it is looked at now, and what is decided then."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from serving.control.observe import Observer
from serving.control.reconcile import Clock, Reconciler
from serving.control.records import Record
from serving.control.state import Providers
from serving.core.rollout import decide
from serving.core.rollout_clocks import left_out, unwatched_s
from serving.core.rollout_states import State

log = logging.getLogger(__name__)

_JITTER_S: Final = 0.05


class Decisions:
    """Decides on each rollout as often as it wants to be looked at, or as its replicas change."""

    def __init__(
        self, reconciler: Reconciler, observer: Observer, providers: Providers, clock: Clock
    ) -> None:
        self._reconciler, self._observer = reconciler, observer
        self._providers, self._clock = providers, clock
        self._ticked: dict[str, tuple[float, tuple[bool, ...] | None]] = {}
        self._missed: set[str] = set()

    def forget(self, rollout_id: str) -> None:
        """The rollout is over."""
        self._ticked.pop(rollout_id, None)
        self._missed.discard(rollout_id)

    def decided_alone(self, record: Record, gateways_known: bool, urgent: bool) -> Record:
        """What cannot be decided stays as it is: no rollout stops another's."""
        try:
            return self._decided(record, gateways_known, urgent)
        except Exception:
            log.exception("rollout %s cannot be decided; it stays as it is", record.rollout.id)
            return record

    def _decided(self, record: Record, gateways_known: bool, urgent: bool) -> Record:
        rollout = record.rollout
        if rollout.state is State.PENDING and not self._stable_routed(record):
            return record
        now = self._clock.unix()
        ready = tuple(
            self._observer.ready(rollout, v) > 0 for v in (rollout.stable, rollout.canary)
        )
        last, was_ready = self._ticked.get(rollout.id, (0.0, None))
        early = 0 <= now - last < rollout.spec.analysis.tick_s - _JITTER_S
        if early and not urgent and ready == was_ready:
            return record
        self._ticked[rollout.id] = (now, ready)
        missed_s = unwatched_s(rollout, record.looked_at, now)
        if missed_s:
            log.warning("rollout %s: for %.0f s nobody looked; left out", rollout.id, missed_s)
            rollout = left_out(rollout, missed_s)
        snapshot, seen = self._observer.snapshot(
            replace(record, rollout=rollout), self._providers, gateways_known=gateways_known
        )
        if record.released:
            # Whether the old version is ready is no longer this rollout's business.
            snapshot = replace(snapshot, stable_ready=max(1, snapshot.stable_ready))
        if self._comes_first(rollout.id, missed=missed_s != 0.0):
            snapshot = replace(snapshot, current=False)
        return replace(seen, rollout=decide(rollout, snapshot), looked_at=now)

    def _comes_first(self, rollout_id: str, *, missed: bool) -> bool:
        """Whether this look comes before what gateways counted while looks were missed."""
        if missed and rollout_id not in self._missed:
            self._missed.add(rollout_id)
            return True
        # So it is with the next one, be it late too: else there would be no end where all are.
        self._missed.discard(rollout_id)
        return False

    def _stable_routed(self, record: Record) -> bool:
        routed = self._reconciler.state.routed.models.get(record.rollout.model)
        return routed is not None and routed.version == record.rollout.stable
