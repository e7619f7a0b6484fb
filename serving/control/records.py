"""A rollout as the controller keeps it: its state, the two versions as they are served, history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from serving.core.plan import Layout, ServedModel
from serving.core.rollout_costs import windows_from_dict, windows_to_dict
from serving.core.rollout_counts import Sample, Tally
from serving.core.rollout_facts import CostWindows, Incident
from serving.core.rollout_states import State
from serving.core.rollout_types import Rollout
from serving.store.rollouts import RolloutRow

_DENSE_S: Final = 10.0
_SPARSE_S: Final = 5.0
"""Samples of the last `_DENSE_S` are all kept; of older ones, one every `_SPARSE_S`."""
_GONE_KEPT: Final = 256
"""Replicas that are no longer heard and are known: one that comes back is not a new one."""
_LOOKS_SAVED_S: Final = 60.0
_TAKING_BACK: Final = frozenset({State.ROLLING_BACK, State.ROLLBACK_FAILED})


@dataclass(frozen=True, slots=True)
class Replicas:
    """The replicas of an application that were `seen`, as (replica, pid).

    `seats` are those that they had, `largest` the most that there were at a time.
    """

    app: str = ""
    seen: tuple[tuple[str, int], ...] = ()
    seats: tuple[str, ...] = ()
    largest: int = 0

    def looked(
        self, app: str, current: Mapping[tuple[str, int], str], *, wanted: int
    ) -> tuple[int, Replicas]:
        """How many have taken a dead one's place, and what is known after this look.

        `current` are those that are there, with their seats: one in a seat of its own has moved
        there, or is one more. Without seats of their own, more than ever are no restarts either
        where so many are `wanted`. Of an application never seen before there are none.
        """
        before = self if app == self.app else Replicas(app)
        known = set(before.seen or current)
        seats = set(before.seats or current.values())
        restarts = sum(seat in seats for replica, seat in current.items() if replica not in known)
        largest = max(before.largest, min(len(current), wanted))
        restarts = max(0, restarts - (largest - before.largest))
        gone = [replica for replica in before.seen if replica not in current]
        return restarts, Replicas(
            app,
            (*gone[-_GONE_KEPT:], *sorted(current)),
            (*before.seats, *sorted(set(current.values()) - set(before.seats)))[-_GONE_KEPT:],
            largest,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One rollout with what the controller needs beside its state.

    `served` has both versions, its default is the stable one. `arms` sums up what each arm counted,
    for readers. `released`: an apply has taken the model's layout over, this rollout only ends.
    `retry`: an apply ended it, so that it says nothing against its version. `cleared`: an apply has
    made its version the stable one all the same, so that nothing is held. `rollback_ms` is how long
    it took from the verdict that took it back until the last gateway had confirmed; None where it
    was not, or nobody saw it. `costs` and `incidents` are what triggers remember of earlier
    ticks, `replicas` the canary's that were seen: what restarts are told by. `looked_at` is the
    time (Unix seconds) of the last tick that looked at it; None before the first.
    """

    rollout: Rollout
    served: ServedModel
    history: tuple[Sample, ...] = ()
    arms: Mapping[str, Any] = field(default_factory=dict)
    released: bool = False
    retry: bool = False
    cleared: bool = False
    rollback_ms: float | None = None
    costs: CostWindows = field(default_factory=CostWindows)
    incidents: tuple[Incident, ...] = ()
    replicas: Replicas = Replicas()
    looked_at: float | None = None

    @property
    def remembered(self) -> tuple[object, ...]:
        """What ticks have seen, and later ones look back on."""
        return self.history, self.costs, self.incidents

    @property
    def live(self) -> bool:
        """Whether ticks can still change something: it runs, or keeps the old version warm."""
        return self.rollout.active or self.rollout.warm_until is not None

    @property
    def taking_back(self) -> bool:
        """Whether the canary is on its way out."""
        return self.rollout.state in _TAKING_BACK

    def targets(self, version: str, digest: str) -> bool:
        """Whether this is what it rolls out."""
        return (self.rollout.canary, self.rollout.canary_digest) == (version, digest)

    def durable(self) -> Record:
        """Without what each tick computes anew."""
        return replace(
            self,
            rollout=replace(self.rollout, verdicts=()),
            history=(),
            arms={},
            costs=CostWindows(),
            incidents=(),
            # That somebody looked is saved with what is saved anyway, and once a minute.
            looked_at=None if self.looked_at is None else self.looked_at // _LOOKS_SAVED_S,
        )

    def with_sample(self, sample: Sample, span_s: float) -> Record:
        """With `sample` at the end of its history, which reaches back `span_s` seconds."""
        history = not_after(self.history, sample.at)
        last = history[-1] if history else None
        if last is not None and (last.stable, last.canary) == (sample.stable, sample.canary):
            # Until the next change the last sample stands for all later ones.
            return self if history is self.history else replace(self, history=history)
        return replace(self, history=_thinned((*history, sample), span_s))

    def to_row(self) -> RolloutRow:
        """For the store."""
        rollout = self.rollout
        body = {
            "rollout": rollout.to_dict(),
            "served": Layout({rollout.model: self.served}).to_dict(),
            "history": [[s.at, list(s.stable), list(s.canary)] for s in self.history],
            "arms": dict(self.arms),
            "released": self.released,
            "retry": self.retry,
            "cleared": self.cleared,
            "rollback_ms": self.rollback_ms,
            "costs": windows_to_dict(self.costs),
            "incidents": [incident.to_dict() for incident in self.incidents],
            "replicas": asdict(self.replicas),
            "looked_at": self.looked_at,
        }
        finished_at = None if rollout.active else rollout.finished_at
        state = rollout.state.value
        return RolloutRow(rollout.id, rollout.model, state, body, rollout.created_at, finished_at)

    @classmethod
    def from_row(cls, row: RolloutRow) -> Record:
        """Read `to_row`'s form."""
        body = row.body
        return cls(
            Rollout.from_dict(body["rollout"]),
            Layout.from_dict(body["served"]).models[row.model],
            tuple(
                Sample(at, _tally(stable), _tally(canary)) for at, stable, canary in body["history"]
            ),
            body["arms"],
            body["released"],
            body["retry"],
            # Rows of earlier versions have none of these.
            body.get("cleared", False),
            body.get("rollback_ms"),
            windows_from_dict(body["costs"]) if "costs" in body else CostWindows(),
            tuple(Incident.from_dict(raw) for raw in body.get("incidents", ())),
            _replicas(body.get("replicas")),
            body.get("looked_at"),
        )


def not_after(history: tuple[Sample, ...], now: float) -> tuple[Sample, ...]:
    """Samples, oldest first, of which none is later than `now` (Unix seconds).

    After the clock was set back they are moved back with it, so that windows stay as long.
    """
    ahead = history[-1].at - now if history else 0.0
    if ahead <= 0:
        return history
    return tuple(replace(sample, at=sample.at - ahead) for sample in history)


def _replicas(raw: Mapping[str, Any] | None) -> Replicas:
    if raw is None:
        return Replicas()
    seen = tuple((replica, pid) for replica, pid in raw["seen"])
    return Replicas(raw["app"], seen, tuple(raw["seats"]), raw["largest"])


def _tally(raw: list[int]) -> Tally:
    requests, failed, batches, failed_batches = raw
    return requests, failed, batches, failed_batches


def _thinned(history: tuple[Sample, ...], span_s: float) -> tuple[Sample, ...]:
    """The newest, and of the others as many as windows of seconds and minutes need."""
    now = history[-1].at
    kept: list[Sample] = []
    for sample in history:
        age = now - sample.at
        if age > _DENSE_S and kept and sample.at - kept[-1].at < _SPARSE_S:
            continue
        kept.append(sample)
    # One sample before the span: what had failed when it began.
    first = sum(s.at < now - span_s for s in kept)
    return tuple(kept[max(0, first - 1) :])
