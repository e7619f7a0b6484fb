"""What a gateway counted after it was taken for gone: its report less an earlier one of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

Plain = Mapping[str, Any]

_NAMES: Final = ("model", "version", "rollout", "epoch", "arm", "replica")
_GAUGES: Final = ("queue_depth", "in_flight", "replicas_connected")


def since(report: Plain, earlier: Plain) -> dict[str, Any]:
    """A report whose counts are those after `earlier`, a report of the same gateway instance.

    Gauges stay as they are. Raises `KeyError`, `TypeError` or `ValueError` if it is malformed.
    """
    rollouts, before = report.get("rollouts", {}), earlier.get("rollouts", {})
    return {
        **report,
        "models": _rows(report["models"], earlier["models"]),
        "unrouted": _less(report.get("unrouted", {}), earlier.get("unrouted", {})),
        "rollouts": {part: _rows(rows, before.get(part, ())) for part, rows in rollouts.items()},
    }


def _rows(rows: Iterable[Plain], earlier: Iterable[Plain]) -> list[Any]:
    known = {_key(row): row for row in earlier}
    return [_less(row, known.get(_key(row), {})) for row in rows]


def _key(row: Plain) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _NAMES)


def _less(now: Any, before: Any) -> Any:
    if isinstance(now, Mapping):
        fixed = (*_NAMES, *_GAUGES)
        return {k: v if k in fixed else _less(v, before.get(k)) for k, v in now.items()}
    if before is None or isinstance(now, str):
        return now
    if isinstance(now, Sequence):
        return [_less(n, b) for n, b in zip(now, before, strict=True)]
    # A user whom another replica failed since is no longer this one's.
    return max(0, now - before)
