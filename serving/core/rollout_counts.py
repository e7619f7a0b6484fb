"""What gateways counted for a rollout, added up: the numbers that every verdict is a function of.

A gateway reports rows, cumulative since it started, one for each (rollout, epoch, arm, replica) and
one for each (rollout, epoch) with what shadow traffic compared. Rows of all gateways, those that
are gone included, add up to one `EpochCounts` an epoch. Counts are kept apart by replica, so that a
verdict can be asked for again without any one of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import nan, pow
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar

_STEP: Final = 1.07

LATENCY_BOUNDS: Final = tuple(50e-6 * _STEP**i for i in range(208))
"""Upper bounds of the latency buckets in seconds, 50 µs to 60 s in steps of 7 %.

Bucket i counts latencies in (LATENCY_BOUNDS[i-1], LATENCY_BOUNDS[i]]; bucket `OVERFLOW` is for what
is slower than the last.
"""

OVERFLOW: Final = len(LATENCY_BOUNDS)

Tally = tuple[int, int, int, int]
"""Requests, those with an event, batches, those with an event: what evidence is made of."""

NOTHING: Final[Tally] = (0, 0, 0, 0)

ArmName = Literal["stable", "canary"]
ARMS: Final[tuple[ArmName, ...]] = ("stable", "canary")

_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many latencies fell into which bucket of `LATENCY_BOUNDS`; empty buckets are left out."""

    buckets: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self.buckets.values())

    def slower(self, bound: int) -> int:
        """How many were slower than `LATENCY_BOUNDS[bound]`."""
        return sum(count for bucket, count in self.buckets.items() if bucket > bound)

    def quantile(self, q: float) -> float:
        """The latency in seconds below which a share `q` (0 < q ≤ 1) lies; nan where all is empty.

        Read off inside its bucket, as if latencies spread evenly there on a logarithmic scale; the
        last bound where it is beyond.
        """
        left = q * self.total
        for bucket in sorted(self.buckets):
            count = self.buckets[bucket]
            if left <= count:
                inside = pow(_STEP, left / count - 1.0) if bucket < OVERFLOW else 1.0
                return LATENCY_BOUNDS[min(bucket, OVERFLOW - 1)] * inside
            left -= count
        return nan

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(_sum(self.buckets, other.buckets))


@dataclass(frozen=True, slots=True)
class ArmCountsRow:
    """What was counted for one arm of one epoch, by one replica or by several.

    Where units stick to their arm (users, ids that come again), `requests` counts each unit of the
    epoch once, `failed` those that the arm failed. `batches` and `failed_batches` are runs, or what
    was drawn together where that is more, that brought either. `latency` has one entry an answered
    request, of units that are known too, `batch_latency` the slowest request of each batch. So many
    of these, `given_up` and `given_up_batches`, are of clients that left after the latency bound.
    `labels` are late labels: (known, wrong); `busy_ns` is the answers' device time, no padding.
    `shielded`, `overridden` and `diverted` are not part of `requests`' evidence: they only inform.
    """

    requests: int = 0
    failed: int = 0
    batches: int = 0
    failed_batches: int = 0
    latency: Histogram = Histogram()
    batch_latency: Histogram = Histogram()
    predictions: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[int, int] = (0, 0)
    busy_ns: int = 0
    shielded: int = 0
    overridden: int = 0
    diverted: int = 0
    given_up: int = 0
    given_up_batches: int = 0

    @property
    def answered(self) -> int:
        """Answers that reached their clients."""
        return self.latency.total - self.given_up

    @property
    def failures(self) -> Tally:
        """Requests and batches, with those that failed."""
        return self.requests, self.failed, self.batches, self.failed_batches

    @property
    def attempts(self) -> Tally:
        """As `failures`, but out of all answers: first failures of units at any time.

        What compares different times, or has none to compare with, needs it: in the next minute
        there are few new units, but many that may fail.
        """
        requests = max(self.requests, self.answered + self.failed)
        batches = max(self.batches, self.batch_latency.total - self.given_up_batches)
        return requests, self.failed, batches, self.failed_batches

    def slow(self, bound: int) -> Tally:
        """Requests and batches, with those slower than `LATENCY_BOUNDS[bound]`."""
        one, batch = self.latency, self.batch_latency
        return one.total, one.slower(bound), batch.total, batch.slower(bound)

    def predicted(self, names: Collection[str], *, other: bool = False) -> Tally:
        """Predictions, and those among `names` (or, with `other`, among none of them).

        The rows of one request are no independent predictions, so a request counts as their batch.
        """
        n = sum(self.predictions.values())
        k = sum(count for name, count in self.predictions.items() if (name in names) != other)
        requests = min(n, self.requests - self.failed)
        return n, k, requests, round(requests * k / n) if n else 0

    def __add__(self, other: ArmCountsRow) -> ArmCountsRow:
        return ArmCountsRow(
            requests=self.requests + other.requests,
            failed=self.failed + other.failed,
            batches=self.batches + other.batches,
            failed_batches=self.failed_batches + other.failed_batches,
            latency=self.latency + other.latency,
            batch_latency=self.batch_latency + other.batch_latency,
            predictions=_sum(self.predictions, other.predictions),
            labels=(self.labels[0] + other.labels[0], self.labels[1] + other.labels[1]),
            busy_ns=self.busy_ns + other.busy_ns,
            shielded=self.shielded + other.shielded,
            overridden=self.overridden + other.overridden,
            diverted=self.diverted + other.diverted,
            given_up=self.given_up + other.given_up,
            given_up_batches=self.given_up_batches + other.given_up_batches,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as in a gateway's report."""
        raw = {name: getattr(self, name) for name in _COUNTERS}
        return {
            **raw,
            "latency": {str(b): n for b, n in self.latency.buckets.items()},
            "batch_latency": {str(b): n for b, n in self.batch_latency.buckets.items()},
            "predictions": dict(self.predictions),
            "labels": {"n": self.labels[0], "k": self.labels[1]},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ArmCountsRow:
        """Read `to_dict`'s form or a gateway's row; what is absent counts 0.

        Raises ValueError for a count that is not an integer ≥ 0, for more failures than there were
        requests (batches, labels; given up, latencies), and for a bucket that does not exist.
        """
        labels = _mapping(raw, "labels")
        row = cls(
            **{name: _count(raw, name) for name in _COUNTERS},
            latency=_histogram(raw, "latency"),
            batch_latency=_histogram(raw, "batch_latency"),
            predictions={str(k): n for k, n in _counts(raw, "predictions")},
            labels=(_count(labels, "n"), _count(labels, "k")),
        )
        row._check()
        return row

    def _check(self) -> None:
        known, wrong = self.labels
        _at_most(self.failed, self.requests, "failed requests")
        _at_most(self.failed_batches, self.batches, "failed batches")
        _at_most(self.given_up, self.latency.total, "requests given up")
        _at_most(self.given_up_batches, self.batch_latency.total, "batches given up")
        _at_most(wrong, known, "wrong labels")


_COUNTERS: Final = tuple(f.name for f in fields(ArmCountsRow) if f.type == "int")


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """One epoch of one rollout, over all gateways.

    `stable` and `canary` map a replica's id to its counts. `pairs` were compared by shadow traffic,
    `disagreements` of them differed, `dropped` copies were not sent or not answered.
    """

    stable: Mapping[str, ArmCountsRow] = field(default_factory=dict)
    canary: Mapping[str, ArmCountsRow] = field(default_factory=dict)
    pairs: int = 0
    disagreements: int = 0
    dropped: int = 0

    def replicas(self, name: ArmName) -> Mapping[str, ArmCountsRow]:
        """The replicas of an arm."""
        return self.canary if name == "canary" else self.stable

    def arm(self, name: ArmName) -> ArmCountsRow:
        """All replicas of an arm together."""
        return sum(self.replicas(name).values(), ArmCountsRow())

    def __add__(self, other: EpochCounts) -> EpochCounts:
        return EpochCounts(
            stable=_merge(self.stable, other.stable),
            canary=_merge(self.canary, other.canary),
            pairs=self.pairs + other.pairs,
            disagreements=self.disagreements + other.disagreements,
            dropped=self.dropped + other.dropped,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "stable": {name: row.to_dict() for name, row in self.stable.items()},
            "canary": {name: row.to_dict() for name, row in self.canary.items()},
            "pairs": self.pairs,
            "disagreements": self.disagreements,
            "dropped": self.dropped,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> EpochCounts:
        """Read `to_dict`'s form. Raises ValueError as `ArmCountsRow.from_dict` does."""
        stable, canary = (
            {r: ArmCountsRow.from_dict(_mapping(rows, r)) for r in rows}
            for rows in (_mapping(raw, arm) for arm in ARMS)
        )
        pairs, disagreements = _count(raw, "pairs"), _count(raw, "disagreements")
        _at_most(disagreements, pairs, "disagreements")
        return cls(stable, canary, pairs, disagreements, _count(raw, "dropped"))


@dataclass(frozen=True, slots=True)
class Sample:
    """What had failed by the time `at` (Unix seconds), over all epochs and replicas."""

    at: float
    stable: Tally
    canary: Tally

    @classmethod
    def of(cls, at: float, counts: Mapping[int, EpochCounts]) -> Sample:
        """Sum up a rollout's counts by epoch."""
        stable, canary = (
            sum((epoch.arm(arm) for epoch in counts.values()), ArmCountsRow()).attempts
            for arm in ARMS
        )
        return cls(at, stable, canary)


def recent(history: Sequence[Sample], window_s: float) -> Sample:
    """What failed in the last `window_s` seconds before the latest of `history` (oldest first).

    Where history does not reach back that far, it is all that failed since it began; nothing
    without history.
    """
    if not history:
        return Sample(0.0, NOTHING, NOTHING)
    latest = history[-1]
    first = bisect_right(history, latest.at - window_s, key=lambda sample: sample.at)
    before = history[max(first - 1, 0)]
    return Sample(
        latest.at,
        _since(latest.stable, before.stable),
        _since(latest.canary, before.canary),
    )


def _since(now: Tally, before: Tally) -> Tally:
    return now[0] - before[0], now[1] - before[1], now[2] - before[2], now[3] - before[3]


@dataclass(frozen=True, slots=True)
class Breakers:
    """Gateways' local breakers for the canary: how many are open now, how often one opened."""

    open: int = 0
    opened: int = 0

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Breakers:
        """Add up rows {"breaker": "closed" | "open", "opened": count}. Raises ValueError."""
        is_open, opened = 0, 0
        for raw in rows:
            if raw.get("breaker") not in ("closed", "open"):
                raise ValueError(f"breaker is closed or open, not {raw.get('breaker')!r}")
            is_open += raw["breaker"] == "open"
            opened += _count(raw, "opened")
        return cls(is_open, opened)


def read_row(raw: Mapping[str, Any]) -> tuple[str, int, EpochCounts]:
    """One row of a gateway's report as (rollout id, epoch, counts).

    A row with an arm has that replica's counts, any other what shadow traffic compared.
    Raises ValueError, with what is wrong and where, for a row that is malformed.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"a row is an object, not {raw!r}")
    rollout, epoch = raw.get("rollout"), raw.get("epoch")
    try:
        if not isinstance(rollout, str) or not rollout:
            raise ValueError(f"rollout is a name, not {rollout!r}")
        number = _checked(epoch, "epoch")
        if "arm" not in raw:
            return rollout, number, EpochCounts.from_dict({**raw, "stable": {}, "canary": {}})
        if raw["arm"] not in ARMS:
            raise ValueError(f"arm is stable or canary, not {raw['arm']!r}")
        replica = raw.get("replica")
        if not isinstance(replica, str) or not replica:
            raise ValueError(f"replica is a name, not {replica!r}")
        replicas = {replica: ArmCountsRow.from_dict(raw)}
        is_canary = raw["arm"] == "canary"
        counts = EpochCounts(canary=replicas) if is_canary else EpochCounts(stable=replicas)
        return rollout, number, counts
    except ValueError as error:
        raise ValueError(f"counts of rollout {rollout!r}, epoch {epoch!r}: {error}") from None


def add_up(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, EpochCounts]]:
    """Rows of any number of gateways as {rollout id: {epoch: counts}}.

    The order of rows makes no difference. Raises ValueError as `read_row` does.
    """
    total: dict[str, dict[int, EpochCounts]] = {}
    for raw in rows:
        rollout, epoch, counts = read_row(raw)
        epochs = total.setdefault(rollout, {})
        epochs[epoch] = epochs[epoch] + counts if epoch in epochs else counts
    return total


def _merge(a: Mapping[str, ArmCountsRow], b: Mapping[str, ArmCountsRow]) -> dict[str, ArmCountsRow]:
    return {
        name: a[name] + b[name] if name in a and name in b else a[name] if name in a else b[name]
        for name in sorted({*a, *b})
    }


def _sum(a: Mapping[_Key, int], b: Mapping[_Key, int]) -> Mapping[_Key, int]:
    if not (a and b):
        return a or b
    return Counter(a) + Counter(b)


def _histogram(raw: Mapping[str, Any], name: str) -> Histogram:
    return Histogram({_bucket(key): n for key, n in _counts(raw, name)})


def _counts(raw: Mapping[str, Any], name: str) -> list[tuple[Any, int]]:
    counts = ((key, _checked(n, f"{name}[{key!r}]")) for key, n in _mapping(raw, name).items())
    return [(key, n) for key, n in counts if n]


def _bucket(key: object) -> int:
    text = str(key)
    if not (text.isascii() and text.isdecimal()) or int(text) > OVERFLOW:
        raise ValueError(f"a latency bucket is a number from 0 to {OVERFLOW}, not {key!r}")
    return int(text)


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[Any, Any]:
    value = raw.get(name, MappingProxyType({}))
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is an object, not {value!r}")
    return value


def _count(raw: Mapping[str, Any], name: str) -> int:
    return _checked(raw.get(name, 0), name)


def _checked(value: object, name: str) -> int:
    # bool is an int to Python, and no count.
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is an integer of at least 0, not {value!r}")
    return value


def _at_most(k: int, n: int, what: str) -> None:
    if k > n:
        raise ValueError(f"{k} {what} of {n}: more than there are")
