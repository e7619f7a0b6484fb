"""What gateways report to the controller, and what they are told in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serving.control.budgets import Budgets
from serving.control.feedback import Feedback, answers_kept_s
from serving.control.ledger import CostLedger
from serving.control.reconcile import Clock, Reconciler
from serving.control.rollouts import Rollouts
from serving.control.scaler import Scaler
from serving.control.totals import Totals, instance_of


class Reports:
    """Hands each report to those whom it concerns.

    `look` is called for what rollouts must not wait for, `wake` where a model that sleeps is asked
    for.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        rollouts: Rollouts,
        totals: Totals,
        scaler: Scaler,
        ledger: CostLedger,
        feedback: Feedback,
        budgets: Budgets,
        *,
        clock: Clock,
        look: Callable[[], None],
        wake: Callable[[], None],
    ) -> None:
        self._reconciler, self._rollouts = reconciler, rollouts
        self._totals, self._scaler, self._ledger = totals, scaler, ledger
        self._feedback, self._budgets = feedback, budgets
        self._clock = clock
        self._look, self._wake = look, wake

    def take(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """A gateway's totals since its start; what the gateway is told in turn.

        That is {"feedback": [{"request_id", "label"}, …]}, and where there are budgets "spent":
        who has used his up, see `Budgets.spent`.
        """
        now = self._clock.monotonic()
        payload = dict(payload)
        # Kept apart: the ledger has cursors of its own.
        usage = payload.pop("usage", ())
        if self._totals.report(payload, now):
            # A gateway has cut a canary off: no time to lose.
            self._rollouts.hurry()
            self._look()
        if self._scaler.is_woken(payload):
            self._wake()
        self._rollouts.reach.heard(instance_of(payload), int(payload["revision"]), now)
        self._ledger.reported(instance_of(payload), usage)
        self._feedback.joined(payload.get("feedback_joined", ()))
        window = answers_kept_s(self._reconciler.board.table)
        due = self._feedback.due(str(payload["gateway"]), now, window)
        told: dict[str, Any] = {"feedback": due} if due else {}
        if self._budgets:
            told["spent"] = self._budgets.spent(self._ledger.spending, self._clock.unix())
        return told
