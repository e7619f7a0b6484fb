"""What `serving tune` tries, and what it makes of what was measured. Pure: no model, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

PERCENTILES: Final = ("p50", "p90", "p95", "p99", "p99.9")
"""What an objective may be about."""
AS_EXPORTED: Final = "as exported"
"""The precision of a model that is cast to no other."""
_HOUR_S: Final = 3600.0
_MILLION: Final = 1e6


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing to measure: `instances` replicas that each merge up to `max_size` rows.

    `concurrency` requests of one row are in flight, over all instances.
    """

    precision: str
    instances: int
    max_size: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came of a setting.

    `throughput` is rows a second, `latency_s` seconds by percentile, `mean_rows` the rows of the
    run that the average request was part of, `usd_per_million` None without a price.
    """

    setting: Setting
    throughput: float
    latency_s: Mapping[str, float]
    mean_rows: float
    requests: int
    usd_per_million: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, latency in milliseconds."""
        setting = self.setting
        return {
            "precision": setting.precision,
            "instances": setting.instances,
            "max_size": setting.max_size,
            "concurrency": setting.concurrency,
            "throughput": round(self.throughput, 3),
            "latency_ms": {name: round(1e3 * s, 4) for name, s in self.latency_s.items()},
            "mean_rows": round(self.mean_rows, 3),
            "requests": self.requests,
            "usd_per_million": self.usd_per_million,
        }


@dataclass(frozen=True, slots=True)
class Objective:
    """What a choice must meet: a percentile of latency in seconds, and USD per million rows."""

    percentile: str = PERCENTILES[3]
    limit_s: float | None = None
    max_usd_per_million: float | None = None

    def met(self, found: Measurement) -> bool:
        """Whether it is. A cost that is not known meets no limit."""
        if self.limit_s is not None and found.latency_s[self.percentile] > self.limit_s:
            return False
        if self.max_usd_per_million is None:
            return True
        cost = found.usd_per_million
        return cost is not None and cost <= self.max_usd_per_million


def settings(
    precision: str, max_sizes: Sequence[int], instances: Sequence[int]
) -> Iterator[Setting]:
    """What is worth measuring of one precision.

    A batch holds no more rows than are in flight, so each size is tried with as many requests as
    fill every instance once, and twice: the second batch waits while the first one runs. Fewer in
    flight are what a smaller size is tried with. Before all, one request at a time.
    """
    seen = set()
    for count in instances:
        for size in max_sizes:
            alone = [1] if (count, size) == (instances[0], max_sizes[0]) else []
            for concurrency in (*alone, count * size, 2 * count * size):
                setting = Setting(precision, count, size, concurrency)
                if setting not in seen:
                    seen.add(setting)
                    yield setting


def sizes_up_to(largest: int) -> tuple[int, ...]:
    """Powers of two below `largest`, and that."""
    return (*(1 << i for i in range((largest - 1).bit_length())), largest)


def usd_per_million(usd_per_hour: float | None, throughput: float) -> float | None:
    """What a million rows cost where all instances together cost `usd_per_hour`."""
    if usd_per_hour is None or throughput <= 0:
        return None
    return usd_per_hour / (throughput * _HOUR_S) * _MILLION


def frontier(found: Sequence[Measurement], percentile: str) -> list[Measurement]:
    """Those that no other beats: in throughput, latency and instances; by latency.

    More instances on one device cost nothing more there, but elsewhere they do.
    """
    best = [m for m in found if not any(_beats(other, m, percentile) for other in found)]
    return sorted(best, key=lambda m: (m.latency_s[percentile], -m.throughput))


def choose(found: Sequence[Measurement], objective: Objective) -> Measurement | None:
    """The cheapest that meets the objective, without prices the one with the highest throughput.

    Of several within 2 % of it, the one with the lowest latency: that much is noise.
    """
    fitting = [m for m in found if objective.met(m)]
    if not fitting:
        return None
    priced = [m for m in fitting if m.usd_per_million is not None]
    least = min((m.usd_per_million or 0.0 for m in priced), default=0.0)
    most = max(m.throughput for m in fitting)
    near = [m for m in priced if (m.usd_per_million or 0.0) <= 1.02 * least] or [
        m for m in fitting if 1.02 * m.throughput >= most
    ]
    return min(near, key=lambda m: m.latency_s[objective.percentile])


def why_none(found: Sequence[Measurement], objective: Objective) -> str:
    """Why nothing meets the objective, with the number that comes closest."""
    percentile, limit_s = objective.percentile, objective.limit_s
    in_time = [m for m in found if limit_s is None or m.latency_s[percentile] <= limit_s]
    if not in_time:
        fastest = min(m.latency_s[percentile] for m in found)
        return (
            f"none of {len(found)} settings is fast enough: "
            f"the least {percentile} is {1e3 * fastest:.3g} ms"
        )
    costs = [m.usd_per_million for m in in_time if m.usd_per_million is not None]
    if not costs:
        return "the device has no price, so no highest cost can be met: see cost.prices"
    return (
        f"of {len(found)} settings {len(in_time)} are fast enough; the cheapest of them costs "
        f"{min(costs):.4g} USD a million rows"
    )


def patch(model: str, chosen: Measurement, buckets: Sequence[int] | None) -> dict[str, Any]:
    """What to put into the configuration for a choice."""
    setting = chosen.setting
    batching: dict[str, Any] = {"max_size": setting.max_size}
    if buckets is not None:
        # A run larger than the largest bucket would have none.
        batching["buckets"] = [*(b for b in buckets if b < setting.max_size), setting.max_size]
    changes: dict[str, Any] = {"replicas": setting.instances, "batching": batching}
    if setting.precision != AS_EXPORTED:
        changes["torch"] = {"dtype": setting.precision}
    return {"models": {model: changes}}


def _beats(other: Measurement, one: Measurement, percentile: str) -> bool:
    a = (-other.throughput, other.latency_s[percentile], other.setting.instances)
    b = (-one.throughput, one.latency_s[percentile], one.setting.instances)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
