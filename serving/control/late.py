"""What a gateway counted after it was taken for gone: its report less what was counted of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from serving.core.rollout_counts import ArmCountsRow, EpochCounts, Histogram

Plain = Mapping[str, Any]
Counts = Mapping[str, Mapping[int, EpochCounts]]
"""Rollout id to epoch to counts."""

_NAMES: Final = ("model", "version")
_FIXED: Final = (*_NAMES, "digest", "queue_depth", "in_flight", "waiting", "replicas_connected")


def since(report: Plain, earlier: Plain) -> dict[str, Any]:
    """A report whose totals of models are those after `earlier`, a report of the same instance.

    Gauges stay as they are, and so does its part for rollouts: see `counted_since`.
    """
    known = {_key(row): row for row in earlier.get("models", ())}
    return {
        **report,
        "models": [_less(row, known.get(_key(row))) for row in report["models"]],
        "unrouted": _less(report.get("unrouted", {}), earlier.get("unrouted")),
    }


def counted_since(now: Counts, before: Counts) -> dict[str, dict[int, EpochCounts]]:
    """What a gateway counted for rollouts after `before`.

    Alone it may have more failures than requests: one that was counted before fails now.
    """
    none = EpochCounts()
    return {
        rollout: {e: _epoch(c, before.get(rollout, {}).get(e, none)) for e, c in epochs.items()}
        for rollout, epochs in now.items()
    }


def _key(row: Plain) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _NAMES)


def _less(now: Any, before: Any) -> Any:
    if before is None or isinstance(now, str):
        return now
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        return {k: v if k in _FIXED else _less(v, before.get(k)) for k, v in now.items()}
    if isinstance(now, Sequence):
        return [_less(n, b) for n, b in zip(now, before, strict=True)]
    return _from(now, before)


def _epoch(now: EpochCounts, before: EpochCounts) -> EpochCounts:
    return EpochCounts(
        _rows(now.stable, before.stable),
        _rows(now.canary, before.canary),
        _from(now.pairs, before.pairs),
        _from(now.disagreements, before.disagreements),
        _from(now.dropped, before.dropped),
    )


def _rows(
    now: Mapping[str, ArmCountsRow], before: Mapping[str, ArmCountsRow]
) -> dict[str, ArmCountsRow]:
    none = ArmCountsRow()
    return {replica: _row(row, before.get(replica, none)) for replica, row in now.items()}


def _row(now: ArmCountsRow, before: ArmCountsRow) -> ArmCountsRow:
    return ArmCountsRow(
        **{f.name: _of(getattr(now, f.name), getattr(before, f.name)) for f in fields(now)}
    )


def _of(now: Any, before: Any) -> Any:
    if isinstance(now, Histogram):
        return Histogram(_of(now.buckets, before.buckets))
    if isinstance(now, Mapping):
        return {key: _from(n, before.get(key, 0)) for key, n in now.items()}
    if isinstance(now, tuple):
        return tuple(map(_from, now, before))
    return _from(now, before)


def _from(now: Any, before: Any) -> Any:
    # A user whom another replica failed since is no longer this one's.
    return max(0, now - before)
