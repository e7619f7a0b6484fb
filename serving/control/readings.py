"""What people read of the store: rollouts, those of the past too, and the audit log."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from serving.control.reconcile import Blocking
from serving.control.records import Record
from serving.control.rollout_views import listed
from serving.control.rollouts import Rollouts
from serving.core.rollout_outlook import next_sentence
from serving.store.audit import Head
from serving.store.sql import Store


class Readings:
    """Reads only. Of a rollout that runs `rollouts` knows more than the store."""

    def __init__(self, rollouts: Rollouts, *, store: Store, in_store: Blocking) -> None:
        self._rollouts = rollouts
        self._store, self._in_store = store, in_store

    async def list_rollouts(
        self, *, model: str | None, active: bool | None, limit: int
    ) -> list[dict[str, Any]]:
        """Rollouts, newest first.

        Raises `StoreError`, or `NotFound` for a model that is not served and never had any.
        """
        read = partial(self._store.rollouts, model=model, active=active, limit=limit)
        running = {r.rollout.id: r for r in self._rollouts.records}
        rows = await self._in_store(read)
        if model is not None and not rows:
            await self._rollouts.check_model(model)
        return [self._listed(running.get(row.id) or Record.from_row(row)) for row in rows]

    def _listed(self, record: Record) -> dict[str, Any]:
        """Its document, and what happens next; None of a rollout that is over."""
        if not record.rollout.active:
            return {**listed(record), "next": None}
        snapshot = self._rollouts.observer.sight(record)
        return {**listed(record), "next": next_sentence(record.rollout, snapshot)}

    async def audit(
        self, *, after: int | None, limit: int, subject: str | None
    ) -> list[dict[str, Any]]:
        """Entries of the audit log. Raises `StoreError`."""
        read = partial(self._store.audit, after=after, limit=limit, subject=subject)
        return [row.to_dict() for row in await self._in_store(read)]

    async def verify_audit(self, expect: str | None) -> Head:
        """Where the intact log ends; `expect` is where it did once, as `Head` prints it.

        Raises `StoreError` that names the first bad entry, or `ConfigError`.
        """
        noted = None if expect is None else Head.parse(expect)
        # Beside the store's own thread: no rollback waits for a long log to be read.
        return await asyncio.to_thread(self._store.verify_audit, noted)
