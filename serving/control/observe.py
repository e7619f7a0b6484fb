"""What a rollout's tick sees: replicas, gateways' counts and the route table, as one snapshot.

Lives on the controller's loop. Restarts of canary replicas are found here: a replica that announces
itself after its application was complete has taken another one's place. Who was there is part of
the rollout's record, so that no restart is lost with a tick that could not be committed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from serving.control.fleet import Fleet
from serving.control.incidents import IncidentWatch
from serving.control.reconcile import Clock, Reconciler
from serving.control.records import Record, Replicas, not_after
from serving.control.state import Providers
from serving.control.totals import Totals
from serving.core.plan import ServedVersion
from serving.core.rollout_costs import after_look, at_equal_size, mark
from serving.core.rollout_counts import ArmName, Sample
from serving.core.rollout_facts import Incident
from serving.core.rollout_progress import due_hooks
from serving.core.rollout_types import ProviderState, Rollout, Snapshot

_LONGEST_LOOK_S: Final = 300.0
"""Some triggers look back this far whatever their plan says."""
_INCIDENTS_KEPT: Final = 200


class Observer:
    """Makes snapshots; remembers what those outside answered last."""

    def __init__(
        self,
        reconciler: Reconciler,
        fleet: Fleet,
        totals: Totals,
        watch: IncidentWatch,
        clock: Clock,
        *,
        tick_s: float,
        drain_s: float,
    ) -> None:
        self._watch = watch
        self._reconciler = reconciler
        self._fleet = fleet
        self._totals = totals
        self._clock = clock
        self._tick_s, self._drain_s = tick_s, drain_s
        self._answers: dict[str, dict[str, ProviderState]] = {}

    def snapshot(
        self, record: Record, providers: Providers, *, gateways_known: bool
    ) -> tuple[Snapshot, Record]:
        """What there is to see, and the record with it in its history.

        Without `gateways_known`, which revision gateways run is unknown and taken as none, and
        what they counted may be missing.
        """
        rollout, now = record.rollout, self._clock.unix()
        record = replace(record, incidents=self._incidents(record, now))
        restarts, replicas = self._restarts(record, now)
        seen = replace(self.sight(record, gateways_known=gateways_known), restarts=restarts)
        equal = at_equal_size(rollout, seen.canary_ready, seen.stable_ready)
        used = mark(rollout, seen.counts, now) if equal else None
        seen = replace(seen, costs=after_look(record.costs, used, seen.prices))
        recorded = record.with_sample(Sample.of(now, seen.counts), _span_s(rollout))
        recorded = replace(recorded, costs=seen.costs, replicas=replicas)
        answers = dict(providers.poll(rollout, now, due_hooks(rollout, seen)))
        self._answers[rollout.id] = answers
        return replace(seen, providers=answers), recorded

    def begin(self) -> None:
        """A tick begins: what the last one saw and could not save is seen again."""
        self._watch.drop()

    def saved(self) -> None:
        """What the tick saw is in the store."""
        self._watch.confirm()

    def sight(self, record: Record, *, gateways_known: bool = True) -> Snapshot:
        """What there is to see, without asking anybody or remembering it."""
        rollout, now = record.rollout, self._clock.unix()
        trials = self._totals.trials
        counts = trials.counts(rollout.id)
        live = self._totals.live(self._clock.monotonic(), self._tick_s)
        revision = self._reconciler.board.revision
        canary = self._routed(rollout, rollout.canary)
        app = canary.app.name if canary is not None else ""
        return Snapshot(
            now=now,
            canary_ready=self.ready(rollout, rollout.canary),
            canary_wanted=self.wanted(record, rollout.canary),
            canary_failed=self._failed(rollout),
            current=gateways_known,
            stable_ready=self.ready(rollout, rollout.stable),
            revision=revision,
            gateways_at=min(self.gateways().values(), default=0) if gateways_known else 0,
            counts=counts,
            providers=self._answers.get(rollout.id, {}),
            breakers=trials.breakers(rollout.id, live),
            history=_up_to_now(record.history, Sample.of(now, counts)),
            prices={
                replica: self._reconciler.price(replica)
                for epoch in counts.values()
                for replica in (*epoch.canary, *epoch.stable)
            },
            costs=record.costs,
            gpus=self._watch.gpus(app),
            incidents=record.incidents,
            ceilings=self._watch.ceilings(app),
        )

    def gateways(self) -> dict[str, int]:
        """The gateway instances that may still route, and the revision that each said it runs.

        That is also one that has been silent for a while: it goes on by the table that it has.
        """
        now = self._clock.monotonic()
        names = self._totals.routing(now, self._tick_s, self._drain_s)
        rows = self._totals.rows(names)
        return {name: int(row["revision"]) for name, row in zip(names, rows, strict=True)}

    def forget(self, rollout: Rollout) -> None:
        """The rollout is over."""
        self._answers.pop(rollout.id, None)
        models = self._reconciler.state.routed.models.values()
        self._watch.keep(s.app.name for m in models for s in m.versions.values())

    def ready(self, rollout: Rollout, version: str) -> int:
        """Ready replicas of a version that is routed."""
        served = self._routed(rollout, version)
        return len(self._reconciler.endpoints.get(served.app.name, ())) if served else 0

    def answering(self, model: str) -> str | None:
        """The version that requests naming none get, but for a split; None: it is not routed."""
        routed = self._reconciler.state.routed.models.get(model)
        return routed.version if routed else None

    def wanted(self, record: Record, version: str) -> int:
        """Replicas that a version is to have: none where nobody asks for it any more."""
        model = self._reconciler.state.desired.models.get(record.rollout.model)
        served = model.versions.get(version) if model else None
        if served is None and not record.live:
            return 0
        app = (served or record.served.versions[version]).app
        return self._reconciler.state.wanted(app)

    def _routed(self, rollout: Rollout, version: str) -> ServedVersion | None:
        model = self._reconciler.state.routed.models.get(rollout.model)
        return model.versions.get(version) if model else None

    def _failed(self, rollout: Rollout) -> str:
        state = self._reconciler.state
        model = state.desired.models.get(rollout.model)
        served = model.versions.get(rollout.canary) if model else None
        routed = self._routed(rollout, rollout.canary)
        # Where only more replicas of it did not start, it goes on with those it has.
        if served is None or (routed is not None and routed.app.name == served.app.name):
            return ""
        return state.given_up.get(served.app.name, "")

    def _incidents(self, record: Record, now: float) -> tuple[Incident, ...]:
        """Those of before, and the new ones of both arms."""
        rollout, found = record.rollout, list(record.incidents)
        versions: tuple[tuple[ArmName, str], ...] = (
            ("canary", rollout.canary),
            ("stable", rollout.stable),
        )
        for arm, version in versions:
            if (served := self._routed(rollout, version)) is not None:
                found += self._watch.look(served.app.name, arm, now)
        return tuple(found[-_INCIDENTS_KEPT:])

    def _restarts(self, record: Record, now: float) -> tuple[tuple[float, ...], Replicas]:
        """When restarts were seen by this look, and who has been seen by now."""
        served, known = self._routed(record.rollout, record.rollout.canary), record.replicas
        if served is None:
            return (), known
        app = served.app.name
        current = {(r.endpoint.replica, int(r.info["pid"])): r.seat for r in self._fleet.of(app)}
        wanted = self._reconciler.state.wanted(served.app)
        restarted, known = known.looked(app, current, wanted=wanted)
        # Two at once are two.
        return tuple(now + i * 1e-3 for i in range(restarted)), known


def _span_s(rollout: Rollout) -> float:
    windows = (trigger.window_s for trigger in rollout.spec.analysis.triggers)
    return max(_LONGEST_LOOK_S, *windows, 0.0)


def _up_to_now(history: tuple[Sample, ...], sample: Sample) -> tuple[Sample, ...]:
    history = not_after(history, sample.at)
    return history if history and history[-1] == sample else (*history, sample)
