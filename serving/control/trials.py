"""What gateways count for rollouts, kept by gateway instance and added up.

A report is cumulative since its gateway's start, so the last one of each instance is all there is
to keep. It is parsed once, when it comes; a malformed row is logged and left out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, Final

from serving.control.late import counted_since
from serving.core.rollout_counts import Breakers, EpochCounts, add_up

log = logging.getLogger(__name__)

_COUNTED: Final = ("trials", "shadows")
_INFORMING: Final = ("shielded", "overridden", "diverted")
_SUMMED: Final = (*_INFORMING, "forgotten")
Plain = Mapping[str, Any]
Counts = dict[str, dict[int, EpochCounts]]
"""Rollout id to epoch to counts."""


class Trials:
    """The rollout part of every gateway's last report. `live` names the rollouts that are kept."""

    def __init__(self) -> None:
        self.live: Collection[str] = ()
        self._counts: dict[str, Counts] = {}
        self._splits: dict[str, list[dict[str, Any]]] = {}

    def take(self, instance: str, rows: Plain, counted: Plain | None = None) -> bool:
        """Replace an instance's counts; whether a breaker has opened since its last report.

        What it had `counted` before is in another instance's counts already.
        """
        before = self._opened(instance)
        found, splits = _parsed(instance, rows), _splits(instance, rows)
        if counted is not None:
            found = counted_since(found, _parsed(instance, counted))
            splits = _splits_since(splits, _splits(instance, counted))
        self._counts[instance], self._splits[instance] = found, splits
        return self._opened(instance) > before

    def drop(self, instance: str) -> None:
        """Forget an instance, whose counts were added to another one's."""
        self._counts.pop(instance, None)
        self._splits.pop(instance, None)

    def counts(self, rollout: str) -> dict[int, EpochCounts]:
        """A rollout's totals by epoch, over all instances that ever were."""
        total: dict[int, EpochCounts] = {}
        for instance in sorted(self._counts):
            for epoch, counts in self._counts[instance].get(rollout, {}).items():
                total[epoch] = total[epoch] + counts if epoch in total else counts
        return dict(sorted(total.items()))

    def breakers(self, rollout: str, live: Collection[str]) -> Breakers:
        """The gateways' local breakers: open ones of `live` instances, openings of all."""
        opened, is_open = 0, 0
        for instance, rows in self._splits.items():
            for row in rows:
                if row["rollout"] == rollout:
                    opened += row["opened"]
                    is_open += row["breaker"] == "open" and instance in live
        return Breakers(is_open, opened)

    def totals(self, rollout: str) -> dict[str, int]:
        """Requests that no verdict is made of: shielded, overridden, diverted."""
        rows = [r for rows in self._splits.values() for r in rows if r["rollout"] == rollout]
        return {name: sum(row[name] for row in rows) for name in _INFORMING}

    def forgotten(self, rollout: str) -> int:
        """Answers that gateways forgot, being too many, before their labels' time was over."""
        rows = (r for rows in self._splits.values() for r in rows if r["rollout"] == rollout)
        return sum(row["forgotten"] for row in rows)

    def carried(self, before: Plain, now: Plain) -> dict[str, list[Any]]:
        """A report's rollout part, with what it no longer has of live rollouts from the one before.

        A gateway forgets an epoch some time after the next one began, and a split after it left the
        route table.
        """
        merged = {}
        for part in (*_COUNTED, "splits"):
            fresh = list(now.get(part, ()))
            known = {_key(row) for row in fresh}
            old = before.get(part, ())
            fresh += [r for r in old if r.get("rollout") in self.live and _key(r) not in known]
            merged[part] = fresh
        return merged

    def folded(self, instances: Collection[str]) -> dict[str, list[Any]]:
        """The rollout parts of several instances as one, of live rollouts only."""
        total: Counts = {}
        splits: dict[str, dict[str, Any]] = {}
        for instance in instances:
            _add(total, self._counts.get(instance, {}))
            for row in self._splits.get(instance, ()):
                closed = {"rollout": row["rollout"], "breaker": "closed"}
                sums = splits.setdefault(row["rollout"], closed)
                for name in ("opened", *_SUMMED):
                    sums[name] = sums.get(name, 0) + row[name]
        total = {r: epochs for r, epochs in total.items() if r in self.live}
        trials = [
            {"rollout": rollout, "epoch": epoch, "arm": arm, "replica": replica, **row.to_dict()}
            for rollout, epochs in total.items()
            for epoch, counts in epochs.items()
            for arm, replicas in (("stable", counts.stable), ("canary", counts.canary))
            for replica, row in replicas.items()
        ]
        shadows = [
            {
                "rollout": rollout,
                "epoch": epoch,
                "pairs": counts.pairs,
                "disagreements": counts.disagreements,
                "dropped": counts.dropped,
            }
            for rollout, epochs in total.items()
            for epoch, counts in epochs.items()
        ]
        kept = [row for row in splits.values() if row["rollout"] in self.live]
        return {"trials": trials, "shadows": shadows, "splits": kept}

    def _opened(self, instance: str) -> int:
        return sum(row["opened"] for row in self._splits.get(instance, ()))


def _key(row: Plain) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("rollout", "epoch", "arm", "replica"))


def _parsed(instance: str, rows: Plain) -> Counts:
    counts: Counts = {}
    for part in _COUNTED:
        for row in rows.get(part, ()):
            try:
                found = add_up([row])
            except ValueError as error:
                log.error("report of gateway %s: %s", instance, error)
                continue
            _add(counts, found)
    return counts


def _splits(instance: str, rows: Plain) -> list[dict[str, Any]]:
    splits = []
    for row in rows.get("splits", ()):
        try:
            breaker = Breakers.of_rows([row])
            informing = {name: int(row.get(name, 0)) for name in _SUMMED}
            rollout = str(row["rollout"])
        except (KeyError, TypeError, ValueError) as error:
            log.error("report of gateway %s: summary of a rollout: %r", instance, error)
            continue
        state = "open" if breaker.open else "closed"
        splits.append({"rollout": rollout, "breaker": state, "opened": breaker.opened, **informing})
    return splits


def _splits_since(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {row["rollout"]: row for row in before}
    counts = ("opened", *_SUMMED)
    return [
        {**row, **{n: max(0, row[n] - known.get(row["rollout"], {}).get(n, 0)) for n in counts}}
        for row in now
    ]


def _add(total: Counts, more: Counts) -> None:
    for rollout, epochs in more.items():
        mine = total.setdefault(rollout, {})
        for epoch, counts in epochs.items():
            mine[epoch] = mine[epoch] + counts if epoch in mine else counts
