"""Sums over gateways of what they count, across their restarts.

A gateway reports its totals since its start, so the deployment's total is the sum over every
gateway instance that ever lived: the last report of each. Instances that were silent for minutes
are folded into one row once there are many. One of them that reports again lives: what it counted
since its last report is added. Of the last `MAX_INSTANCES` that were folded nothing is lost; one
that was folded before them counts from its next report on, which is logged.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from serving.control.late import since
from serving.control.trials import Trials
from serving.core.plan import GatewayView

HISTOGRAMS: Final = ("latency", "gateway", "queue", "compute")
BATCH_SIZE: Final = "batch_size"
BASE: Final = "past"
MAX_INSTANCES: Final = 64
MAX_NAMES: Final = 1024
"""So many that were folded are known by name; of those before them, when the last had started."""
LIVE_TICKS: Final = 5
SILENCE_S: Final = 300.0
"""Who was silent for less is not folded, however many there are."""
_RATE_STEP_S: Final = 5.0
_RATE_STEPS: Final = 12


log = logging.getLogger(__name__)

ArmKey = tuple[str, str]
"""(model, version)"""


@dataclass
class Histogram:
    """Counts per bucket (inclusive upper `bounds`, and one more for what lies above) and a sum."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float = 0.0

    @classmethod
    def empty(cls, bounds: Sequence[float]) -> Histogram:
        """No observation yet."""
        return cls(tuple(bounds), [0] * (len(bounds) + 1))

    def add(self, bounds: Sequence[float], counts: Sequence[int], total: float) -> None:
        """Add another histogram.

        Where its bounds differ (a gateway of another release), each bucket goes into the first of
        ours that holds it whole: cumulative counts stay lower bounds of the truth.
        """
        same = len(bounds) == len(self.bounds) and tuple(bounds) == self.bounds
        for i, n in enumerate(counts):
            if same:
                self.counts[i] += n
            else:
                above = i >= len(bounds)
                at = len(self.bounds) if above else bisect_left(self.bounds, bounds[i])
                self.counts[at] += n
        self.sum += total

    @property
    def count(self) -> int:
        """Observations."""
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """As Prometheus' histogram_quantile: linear inside the bucket; None when empty."""
        rank, seen = q * self.count, 0
        if not self.count:
            return None
        for i, n in enumerate(self.counts):
            if n and seen + n >= rank:
                if i == len(self.bounds):
                    return self.bounds[-1]
                lower = self.bounds[i - 1] if i else 0.0
                return lower + (self.bounds[i] - lower) * (rank - seen) / n
            seen += n
        return self.bounds[-1]


@dataclass
class ArmTotals:
    """One version's totals over all gateways; the gauges over the live ones.

    `queue_depth` counts rows, `waiting` the requests that they belong to.
    """

    requests: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    queue_depth: int = 0
    in_flight: int = 0
    waiting: int = 0

    @property
    def answered(self) -> int:
        """Requests that the model answered."""
        return self.requests.get("success", 0)

    @property
    def shielded(self) -> int:
        """Requests that this version failed and another answered: they are in its totals alone."""
        return self.requests.get("shielded", 0)

    @property
    def total(self) -> int:
        """Requests that ended at this version: over all versions each request counts once."""
        return sum(self.requests.values()) - self.shielded

    @property
    def errors(self) -> int:
        """Requests whose client got an error; who gave up is none of them, nor is `shielded`."""
        return self.total - self.answered - self.requests.get("cancelled", 0)

    def add(self, row: Mapping[str, Any], bounds: Mapping[str, Sequence[float]]) -> None:
        """Add one gateway's totals."""
        for outcome, n in row["requests"].items():
            self.requests[outcome] = self.requests.get(outcome, 0) + int(n)
        for name in (*HISTOGRAMS, BATCH_SIZE):
            ours = bounds["rows" if name == BATCH_SIZE else "seconds"]
            histogram = self.histograms.setdefault(name, Histogram.empty(ours))
            histogram.add(ours, row[name]["counts"], float(row[name]["sum"]))

    def to_row(self, model: str, version: str) -> dict[str, Any]:
        """The form of a report's row."""
        histograms = {n: {"counts": h.counts, "sum": h.sum} for n, h in self.histograms.items()}
        return {"model": model, "version": version, "requests": self.requests, **histograms}


class Totals:
    """The last report of every gateway instance. Lives on the controller's loop.

    `stored` is what an earlier controller had; what is silent is so since `now` (monotonic).
    """

    def __init__(self, stored: Mapping[str, Mapping[str, Any]], now: float = 0.0) -> None:
        self._began = now
        self._base: Mapping[str, Any] = stored.get(BASE) or {"folded": []}
        # By instance: the report of one that was folded up to which the base has what it counted.
        self._late: dict[str, Mapping[str, Any]] = dict(self._base.get("late", {}))
        self._rows = {k: v for k, v in stored.items() if k != BASE}
        self._saved = {k: _counts(v) for k, v in self._rows.items()}
        self._heard: dict[str, float] = {}
        self._noted: deque[tuple[float, Counter[str]]] = deque(maxlen=_RATE_STEPS + 1)
        self.trials = Trials()
        for instance, row in stored.items():
            self.trials.take(instance, row.get("rollouts", {}), self._counted(instance))

    def report(self, payload: Mapping[str, Any], now: float) -> bool:
        """Take a report; whether a local breaker has opened since this gateway's last one.

        Raises `KeyError`, `TypeError` or `ValueError` if it is malformed.
        """
        instance = instance_of(payload)
        for row in payload["models"]:
            ArmTotals().add(row, payload["bounds"])
        if instance not in self._late and self._was_folded(instance):
            log.warning(
                "gateway %s was taken for gone: what it counted until now, after its last report "
                "before, is not counted",
                instance,
            )
            self._late[instance] = payload
        earlier = self._late.get(instance, {})
        # What cannot be compared is malformed, and found out now.
        since(payload, earlier)
        before = self._rows.get(instance, earlier).get("rollouts", {})
        rollouts = self.trials.carried(before, payload.get("rollouts", {}))
        self._rows[instance] = {**payload, "rollouts": rollouts}
        self._heard[instance] = now
        return self.trials.take(instance, rollouts, self._counted(instance))

    def _was_folded(self, instance: str) -> bool:
        """Whether the base may have counts of it; who is unknown and that old is taken for so."""
        started_at, unnamed_until = _started_at(instance), self._base.get("unnamed_until")
        if instance in self._base["folded"]:
            return True
        if unnamed_until is None or instance in self._rows:
            return False
        return started_at <= float(unnamed_until)

    def _counted(self, instance: str) -> Mapping[str, Any] | None:
        """What the base has of an instance's counts for rollouts."""
        earlier = self._late.get(instance)
        return None if earlier is None else earlier.get("rollouts", {})

    def _own(self, instance: str) -> Mapping[str, Any]:
        """An instance's last report, without what the base has of it."""
        row, earlier = self._rows[instance], self._late.get(instance)
        return row if earlier is None else since(row, earlier)

    @property
    def unheard(self) -> bool:
        """Whether some stored instance has not reported since this object was made."""
        return any(instance not in self._heard for instance in self._rows)

    def live(self, now: float, tick_s: float) -> list[str]:
        """The instances heard within the last few ticks."""
        oldest = now - LIVE_TICKS * max(tick_s, 1.0)
        return sorted(i for i, heard in self._heard.items() if heard >= oldest)

    def routing(self, now: float, tick_s: float, drain_s: float) -> list[str]:
        """The instances that may still send requests somewhere: one that is silent for `drain_s`.

        Of a stored one that has not reported yet nobody knows: it counts as heard at the start.
        """
        oldest = now - max(drain_s, LIVE_TICKS * max(tick_s, 1.0))
        return sorted(i for i in self._rows if self._heard.get(i, self._began) >= oldest)

    def rows(self, instances: Iterable[str]) -> list[Mapping[str, Any]]:
        """The last reports of some instances."""
        return [self._rows[i] for i in instances]

    def views(self, now: float, tick_s: float) -> list[GatewayView]:
        """What the live gateways route by and have not answered yet."""
        views = []
        for row in self.rows(self.live(now, tick_s)):
            unanswered: Counter[ArmKey] = Counter()
            for m in row["models"]:
                key = (str(m["model"]), str(m["version"]))
                unanswered[key] += int(m["queue_depth"]) + int(m["in_flight"])
            views.append(GatewayView(int(row["revision"]), unanswered))
        return views

    def sum(self, live: Iterable[str] = ()) -> dict[ArmKey, ArmTotals]:
        """Totals by (model, version); gauges are added for `live` instances only."""
        arms: dict[ArmKey, ArmTotals] = {}
        current = set(live)
        own = ((instance, self._own(instance)) for instance in self._rows)
        for instance, row in (*own, (BASE, self._base)):
            for m in row.get("models", ()):
                arm = arms.setdefault((m["model"], m["version"]), ArmTotals())
                arm.add(m, row["bounds"])
                if instance in current:
                    arm.queue_depth += int(m["queue_depth"])
                    arm.in_flight += int(m["in_flight"])
                    # A gateway of an earlier release does not say.
                    arm.waiting += int(m.get("waiting", 0))
        return arms

    def unrouted(self) -> Counter[str]:
        """Requests for which no model was found, by error slug."""
        found: Counter[str] = Counter()
        for row in (*map(self._own, self._rows), self._base):
            found.update(row.get("unrouted", {}))
        return found

    def unsaved(self) -> dict[str, Mapping[str, Any]]:
        """The rows whose counts are not in the store as they are now."""
        rows = {i: r for i, r in self._rows.items() if self._saved.get(i) != _counts(r)}
        late = self._late.keys() != self._base.get("late", {}).keys()
        return {**rows, BASE: {**self._base, "late": dict(self._late)}} if late else rows

    def saved(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """`rows` are in the store."""
        self._base = rows.get(BASE, self._base)
        self._saved.update({i: _counts(row) for i, row in rows.items() if i != BASE})

    def note_rates(self, now: float) -> None:
        """Remember how many requests each model has had by now, for `rate`."""
        if self._noted and now - self._noted[-1][0] < _RATE_STEP_S:
            return
        requests: Counter[str] = Counter()
        for (model, _), arm in self.sum().items():
            requests[model] += arm.total
        self._noted.append((now, requests))

    def rate(self, model: str) -> float:
        """Requests a second of a model, over the last minute or as long as there is to go by."""
        if len(self._noted) < 2:
            return 0.0
        (since, before), (until, after) = self._noted[0], self._noted[-1]
        return (after[model] - before[model]) / (until - since)

    def excess(self, now: float) -> list[str]:
        """Of the instances that are silent, the longest so beyond the number that is kept apart."""
        heard = {i: self._heard.get(i, self._began) for i in self._rows}
        silent = sorted((i for i in heard if now - heard[i] > SILENCE_S), key=heard.__getitem__)
        return silent[: max(0, len(silent) - MAX_INSTANCES)]

    def folded(self, instances: Sequence[str]) -> dict[str, Any]:
        """The base row with `instances` added, and their reports: no later one repeats them."""
        rows = [self._base, *map(self._own, instances)]
        past: dict[ArmKey, ArmTotals] = {}
        unrouted: Counter[str] = Counter()
        bounds: Mapping[str, Sequence[float]] = {}
        for row in rows:
            bounds = row.get("bounds", bounds)
            unrouted.update(row.get("unrouted", {}))
            for m in row.get("models", ()):
                past.setdefault((m["model"], m["version"]), ArmTotals()).add(m, row["bounds"])
        names = list(dict.fromkeys((*self._base["folded"], *instances)))
        until = self._base.get("unnamed_until")
        unnamed = [_started_at(name) for name in names[:-MAX_NAMES]]
        unnamed += [] if until is None else [float(until)]
        models = [arm.to_row(*key) for key, arm in past.items()]
        return {
            "folded": names[-MAX_NAMES:],
            "unnamed_until": max(unnamed, default=None),
            "late": self._late_after(instances),
            "models": models,
            "bounds": dict(bounds),
            "unrouted": dict(unrouted),
            "rollouts": self.trials.folded([BASE, *instances]),
        }

    def _late_after(self, instances: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """`_late` once `instances` are folded: those that live, and the last that do not."""
        others = {i: row for i, row in self._late.items() if i not in instances}
        living = {i: row for i, row in others.items() if i in self._rows}
        gone = {i: row for i, row in others.items() if i not in living}
        gone |= {i: self._rows[i] for i in instances}
        return {**living, **dict(list(gone.items())[-MAX_INSTANCES:])}

    def fold(self, base: Mapping[str, Any], instances: Iterable[str]) -> None:
        """`base`, which holds `instances`, is in the store."""
        self._base = base
        self.trials.take(BASE, base["rollouts"])
        for instance in instances:
            self.trials.drop(instance)
            del self._rows[instance]
            self._saved.pop(instance, None)
            self._heard.pop(instance, None)
        # One that reported while the base was saved lives.
        living = {i: row for i, row in self._late.items() if i in self._rows}
        self._late = {**living, **base["late"]}


def instance_of(payload: Mapping[str, Any]) -> str:
    """The gateway process that a report is from: a restarted one is another."""
    return f"{payload['gateway']}@{payload['started_at']}"


def _started_at(instance: str) -> float:
    """When a gateway process started, in Unix time."""
    return float(instance.rpartition("@")[2])


def _counts(payload: Mapping[str, Any]) -> str:
    """What of a report is worth a write: the totals, not the gauges."""
    volatile = {"queue_depth", "in_flight", "waiting", "replicas_connected"}
    rows = [{k: v for k, v in m.items() if k not in volatile} for m in payload["models"]]
    counted = [rows, payload.get("unrouted"), payload.get("rollouts")]
    return json.dumps(counted, sort_keys=True)
