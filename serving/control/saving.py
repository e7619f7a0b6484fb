"""Saves what is counted and learned: totals, memory profiles, GPUs, the ledger."""

from __future__ import annotations

import asyncio

from serving.control.budgets import Budgets
from serving.control.feedback import Feedback
from serving.control.gpus import Gpus
from serving.control.ledger import CostLedger
from serving.control.placer import Placer
from serving.control.reconcile import Blocking, Clock
from serving.control.totals import BASE, Totals
from serving.store.sql import Store


class Saving:
    """One save at a time; what could not be saved is saved by the next."""

    def __init__(
        self,
        totals: Totals,
        ledger: CostLedger,
        gpus: Gpus,
        placer: Placer,
        feedback: Feedback,
        budgets: Budgets,
        *,
        store: Store,
        in_store: Blocking,
        clock: Clock,
        tick_s: float,
    ) -> None:
        self._totals, self._ledger, self._gpus = totals, ledger, gpus
        self._placer, self._feedback, self._budgets = placer, feedback, budgets
        self._store, self._in_store = store, in_store
        self._clock, self._tick_s = clock, tick_s
        self._flushing = asyncio.Lock()

    async def flush(self) -> None:
        """Save what is unsaved, and forget gateways that are gone. Raises `StoreError`."""
        if self._budgets:
            # First: a store that is away is no reason to let anybody spend more.
            self._ledger.update_spending()
        async with self._flushing:
            now, totals = self._clock.monotonic(), self._totals
            totals.note_rates(now)
            self._feedback.keep(
                str(r["gateway"]) for r in totals.rows(totals.live(now, self._tick_s))
            )
            if past := totals.excess(now):
                base = totals.folded(past)
                await self._in_store(self._store.fold_counters, BASE, base, past)
                totals.fold(base, past)
            if learned := self._placer.unsaved():
                await self._in_store(self._store.save_memory_profiles, learned)
                self._placer.saved(learned)
            if unsaved := totals.unsaved():
                await self._in_store(self._store.save_counters, unsaved)
                totals.saved(unsaved)
            await self._gpus.flush()
            await self._ledger.flush()
