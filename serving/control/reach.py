"""How long a rollback takes from its verdict to the last gateway, as gateways confirm it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Rollback:
    """`revision` is the first route table without the version; None until it is published."""

    verdict_at: float
    revision: int | None = None
    confirmed: dict[str, float] = field(default_factory=dict)


class Reach:
    """The rollbacks that are on their way to the gateways. Times are monotonic seconds.

    A gateway is its instance, as `Totals` names them. A verdict that a restart of the controller
    came after is not measured.
    """

    def __init__(self) -> None:
        self._rollbacks: dict[str, _Rollback] = {}

    def decided(self, rollout: str, at: float) -> None:
        """A rollout is taken back; the first time counts, should its commit have to be repeated."""
        self._rollbacks.setdefault(rollout, _Rollback(at))

    def published(self, rollout: str, revision: int, running: Mapping[str, int], at: float) -> None:
        """It is in the routes since `revision`; `running` is what each live gateway runs."""
        rollback = self._rollbacks.get(rollout)
        if rollback is not None and rollback.revision is None:
            rollback.revision = revision
            for gateway, runs in running.items():
                self.heard(gateway, runs, at)

    def heard(self, gateway: str, revision: int, at: float) -> None:
        """A gateway runs a revision."""
        for rollback in self._rollbacks.values():
            if rollback.revision is not None and revision >= rollback.revision:
                rollback.confirmed.setdefault(gateway, at)

    def took(self, rollout: str, live: Collection[str]) -> float | None:
        """Seconds from the verdict to the last live gateway; None without all of them, or any."""
        rollback = self._rollbacks.get(rollout)
        if rollback is None or not live or not set(live) <= rollback.confirmed.keys():
            return None
        return max(rollback.confirmed[gateway] for gateway in live) - rollback.verdict_at

    def keep(self, rollouts: Collection[str]) -> None:
        """Forget every other rollout."""
        self._rollbacks = {r: b for r, b in self._rollbacks.items() if r in rollouts}
