"""Tells of what was committed of rollouts: the log, and by way of the providers the webhooks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from serving.control.notices import notices
from serving.control.reconcile import Clock, Reconciler
from serving.control.records import Record
from serving.control.state import Providers

log = logging.getLogger(__name__)

RETOLD_S: Final = 600.0
"""After a restart, what happened in the last so many seconds is told again."""


class Telling:
    """Tells each change after its commit; it may be told twice, or not at all."""

    def __init__(self, reconciler: Reconciler, providers: Providers, clock: Clock) -> None:
        self._reconciler, self._providers, self._clock = reconciler, providers, clock

    def tell(self, before: Record | None, after: Record, now: float) -> None:
        """Tell of what a commit changed of a rollout; `before` is None for a new one."""
        old, new = before.rollout if before else None, after.rollout
        if old is None or old.state is not new.state or old.step != new.step:
            where = f"{new.state.value}, weight {new.weight:g}"
            log.info("rollout %s: %s: %s", new.id, where, new.reason)
        for notice in notices(old, new, revision=self._reconciler.board.revision, now=now):
            self._providers.emit(notice)

    def tell_again(self, records: Iterable[Record]) -> None:
        """The last controller may have ended before it told; told again, a notice has its key."""
        now, revision = self._clock.unix(), self._reconciler.board.revision
        for record in records:
            if now - record.rollout.changed_at < RETOLD_S:
                for notice in notices(None, record.rollout, revision=revision, now=now):
                    if notice.subject == "transition":
                        self._providers.emit(notice)
