"""Rollouts as JSON documents, for the command line, the console and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from serving.control.observe import Observer
from serving.control.overlay import default_version
from serving.control.records import Record
from serving.control.totals import ArmTotals
from serving.core.detect import Detection, Traffic, detections
from serving.core.rollout_costs import spent, uses
from serving.core.rollout_counts import (
    ARMS,
    LATENCY_BOUNDS,
    ArmCountsRow,
    EpochCounts,
    Histogram,
)
from serving.core.rollout_outlook import next_sentence, replaced_sentence
from serving.core.rollout_spec import RolloutSpec
from serving.core.rollout_timing import step_times
from serving.core.rollout_types import Rollout, Snapshot
from serving.core.urls import place
from serving.errors import ServingError

Price = Callable[[str], float | None]
"""USD an hour of a replica; None where it is not known."""
_QUANTILES: Final = (("p50_s", 0.5), ("p99_s", 0.99))
# What a client did wrong, gave up, or asked for beyond what there is room for.
_NO_FAULT: Final = frozenset(
    {
        "success",
        "cancelled",
        *(e.slug for e in ServingError.__subclasses__() if e.http_status < 500),
    }
)


def arms_summary(counts: Mapping[int, EpochCounts], price: Price) -> dict[str, dict[str, Any]]:
    """What each arm counted over all epochs; empty where nothing was counted yet."""
    if not counts:
        return {}
    return {arm: _arm([c.replicas(arm) for c in counts.values()], price) for arm in ARMS}


def _arm(epochs: Sequence[Mapping[str, ArmCountsRow]], price: Price) -> dict[str, Any]:
    row = sum((row for rows in epochs for row in rows.values()), ArmCountsRow())
    known, wrong = row.labels
    used = uses(epochs)
    cost = spent(used, {replica: price(replica) for replica in used})
    return {
        "usd_per_1000": cost.usd_per_1000,
        "device_s_per_1000": cost.s_per_1000,
        "requests": row.requests,
        "failed": row.failed,
        "batches": row.batches,
        "labels": known,
        "wrong": wrong,
        **{name: _quantile(row.latency, q) for name, q in _QUANTILES},
    }


def _quantile(latency: Histogram, q: float) -> float | None:
    return latency.quantile(q) if latency.total else None


def shadow_summary(counts: Mapping[int, EpochCounts]) -> dict[str, int]:
    """What shadow traffic compared over all epochs."""
    return {
        name: sum(getattr(c, name) for c in counts.values())
        for name in ("pairs", "disagreements", "dropped")
    }


def listed(record: Record) -> dict[str, Any]:
    """A rollout in a list: its own document."""
    rollout = record.rollout
    return {
        **rollout.to_dict(),
        "spec": readable(rollout.spec),
        "rollback_ms": record.rollback_ms,
    }


def readable(spec: RolloutSpec) -> dict[str, Any]:
    """A plan as anybody may read it: of each URL scheme, host and port."""
    raw = spec.to_dict()
    gates = [step["gate"] for step in raw["steps"] if step["gate"]]
    for source in (*gates, *raw["analysis"]["triggers"], *raw["webhooks"]):
        source["url"] = place(source["url"]) if source["url"] else ""
    return raw


def shown(record: Record, snapshot: Snapshot, observer: Observer) -> dict[str, Any]:
    """One rollout with what its arms counted, who answers now, and what happens next."""
    rollout = record.rollout
    answering = observer.answering(rollout.model)
    counted = arms_summary(snapshot.counts, snapshot.prices.get) or dict(record.arms)
    empty = _arm((), snapshot.prices.get)
    replaced = not rollout.active and answering != default_version(rollout)
    return {
        **listed(record),
        "arms": {
            arm: {
                **empty,
                **counted.get(arm, {}),
                "version": version,
                "weight": weight,
                "ready": observer.ready(rollout, version),
                "wanted": observer.wanted(record, version),
            }
            for arm, version, weight in _shares(rollout, answering)
        },
        "shadowed": shadow_summary(snapshot.counts),
        "answering": answering,
        "next": replaced_sentence(rollout, answering)
        if replaced
        else next_sentence(rollout, snapshot),
    }


def _shares(rollout: Rollout, answering: str | None) -> tuple[tuple[str, str, float], ...]:
    """Each arm, its version and its share of the requests now."""
    if not rollout.active:
        arms = ("stable", rollout.stable), ("canary", rollout.canary)
        return tuple((arm, version, float(version == answering)) for arm, version in arms)
    weight = rollout.weight
    return ("stable", rollout.stable, 1.0 - weight), ("canary", rollout.canary, weight)


def planned(
    model: str,
    stable: str,
    canary: str,
    spec: RolloutSpec,
    *,
    requests_per_s: float,
    answers: ArmTotals,
    replicas: int,
) -> dict[str, Any]:
    """What a rollout would do, and how soon it would notice which fault at today's traffic."""
    found: tuple[Detection, ...] = ()
    if requests_per_s > 0:
        traffic = Traffic(requests_per_s, _as_counts(answers), replicas)
        found = detections(spec, traffic)
    return {
        "model": model,
        "stable": stable,
        "canary": canary,
        "spec": readable(spec),
        "requests_per_s": requests_per_s,
        "steps": [asdict(time) for time in step_times(spec, requests_per_s)],
        "detections": [asdict(detection) for detection in found],
    }


def _as_counts(totals: ArmTotals) -> ArmCountsRow:
    """A version's totals in the finer buckets that verdicts are made of, as well as they tell."""
    latency = totals.histograms.get("latency")
    buckets: dict[int, int] = {}
    if latency is not None:
        edges = (0.0, *latency.bounds)
        for i, count in enumerate(latency.counts):
            if count:
                upper = edges[i + 1] if i + 1 < len(edges) else edges[-1]
                _spread(buckets, edges[min(i, len(edges) - 1)], upper, count)
    # What it failed while it was a canary was its failure, whoever answered then.
    failed = sum(n for outcome, n in totals.requests.items() if outcome not in _NO_FAULT)
    return ArmCountsRow(
        requests=totals.answered + failed,
        failed=failed,
        batches=totals.answered + failed,
        failed_batches=failed,
        latency=Histogram(buckets),
    )


def _spread(buckets: dict[int, int], lower: float, upper: float, count: int) -> None:
    """Share a coarse bucket's count among the fine ones in it; the rest goes into the highest."""
    inside = [i for i, bound in enumerate(LATENCY_BOUNDS) if lower < bound <= upper]
    inside = inside or [min(len(LATENCY_BOUNDS) - 1, sum(b < upper for b in LATENCY_BOUNDS))]
    each, rest = divmod(count, len(inside))
    for i in inside:
        buckets[i] = buckets.get(i, 0) + each
    buckets[inside[-1]] += rest
