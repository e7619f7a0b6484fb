"""The ledger as JSON documents, for the command line, the console and metrics.

Dollars are divided here only: `nano_usd` is exact, what is per 1,000 inferences is not. `usd` is
None where nothing has a price. A successful inference costs *direct* what its own rows took;
*loaded* is that with all else that its version cost (padding, failures, warm-up, idle) spread over
what was served. Shadow traffic is its rollout's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from serving.core.ledger_accounts import Amount, Kind, kwh
from serving.store.ledger import LedgerRow

DIMENSIONS: Final = ("model", "version", "tenant", "gpu", "kind")
MONTH_S: Final = 730 * 3600
MIN_PROJECTED_S: Final = 60.0
_FIELD: Final = {"gpu": "device"}


@dataclass
class _Group:
    kinds: dict[Kind, Amount] = field(default_factory=dict)
    loaded_nano: float = 0.0
    priced: float = 0.0

    def add(self, row: LedgerRow, load: float | None) -> None:
        amount = Amount(row.nano_usd, row.ns, row.unpriced_ns, row.requests, row.energy_mj)
        self.kinds.setdefault(Kind(row.kind), Amount()).add(amount)
        if row.kind == Kind.DIRECT:
            self.priced += _priced(row)
            if load is not None:
                self.loaded_nano += row.nano_usd * load


def _priced(row: LedgerRow) -> float:
    """How many of a row's requests ran where there is a price: by time, if it came in between."""
    if not row.unpriced_ns:
        return row.requests
    return row.requests * (1 - row.unpriced_ns / row.ns) if row.ns else 0.0


def cost_view(
    rows: Sequence[LedgerRow],
    by: Sequence[str],
    *,
    since: float | None,
    now: float,
    grid_gco2e_per_kwh: float | None,
    rollouts: Iterable[tuple[str, str, str]] = (),
    budgets: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What `serving cost` shows. `by` are of `DIMENSIONS`, `rollouts` (model, stable, canary).

    `since` is None for all time; times are Unix seconds. `budgets` are those of today, whatever
    `since` is; see `Budgets.rows`.
    """
    loads = _loads(rows)
    begin = min((row.minute for row in rows if row.minute), default=None)
    span: float | None = None
    if begin is not None and all(row.minute for row in rows):
        span = now - max(begin, since or 0.0)
    groups: dict[tuple[str, ...], _Group] = defaultdict(_Group)
    for row in rows:
        key = tuple(str(getattr(row, _FIELD.get(name, name))) for name in by)
        groups[key].add(row, loads.get((row.model, row.version)))
    total = _Group()
    for row in rows:
        total.add(row, loads.get((row.model, row.version)))
    return {
        "since": since,
        "until": now,
        "by": list(by),
        "grid_gco2e_per_kwh": grid_gco2e_per_kwh,
        "groups": [
            {**dict(zip(by, key, strict=True)), **_shown(group, span, grid_gco2e_per_kwh)}
            for key, group in sorted(groups.items())
        ],
        "total": _shown(total, span, grid_gco2e_per_kwh),
        "rollouts": [_compared(rows, *rollout) for rollout in rollouts],
        "budgets": [dict(budget) for budget in budgets],
    }


def _loads(rows: Iterable[LedgerRow]) -> dict[tuple[str, str], float]:
    """By version: what it cost in all, less shadow traffic, as a multiple of its direct cost."""
    all_: dict[tuple[str, str], int] = defaultdict(int)
    direct: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row.kind != Kind.SHADOW:
            all_[row.model, row.version] += row.nano_usd
        if row.kind == Kind.DIRECT:
            direct[row.model, row.version] += row.nano_usd
    return {key: all_[key] / nano for key, nano in direct.items() if nano > 0}


def _shown(group: _Group, span: float | None, grid: float | None) -> dict[str, Any]:
    kinds, sum_ = group.kinds, Amount()
    for amount in kinds.values():
        sum_.add(amount)
    direct = kinds.get(Kind.DIRECT, Amount())
    leased_ns = sum_.ns - kinds.get(Kind.UNALLOCATED, Amount()).ns
    idle_ns = kinds.get(Kind.IDLE, Amount()).ns
    used = None if sum_.energy_mj is None else kwh(sum_.energy_mj)
    # What ran without a price must not make the rest look cheaper.
    served = group.priced if direct.ns > direct.unpriced_ns else 0
    projects = span is not None and span >= MIN_PROJECTED_S
    usd = _usd(sum_)
    return {
        "nano_usd": sum_.nano_usd,
        "usd": usd,
        "kinds": {
            kind.value: {
                "nano_usd": amount.nano_usd,
                "usd": _usd(amount),
                "seconds": amount.ns / 1e9,
                "unpriced_seconds": amount.unpriced_ns / 1e9,
                "requests": amount.requests,
            }
            for kind, amount in sorted(kinds.items())
        },
        "seconds": sum_.ns / 1e9,
        "unpriced_seconds": sum_.unpriced_ns / 1e9,
        "requests": direct.requests,
        "usd_per_1000": {
            "direct": direct.nano_usd / 1e6 / served if served > 0 else None,
            "loaded": group.loaded_nano / 1e6 / served if served > 0 else None,
        },
        "idle_share": max(0.0, idle_ns / leased_ns) if leased_ns > 0 else None,
        "usd_per_month": usd / span * MONTH_S if projects and span and usd is not None else None,
        "energy_wh_estimate": None if used is None else used * 1e3,
        "gco2e_estimate": None if used is None or grid is None else used * grid,
    }


def _usd(amount: Amount) -> float | None:
    """Dollars; None, not 0, where none of the time has a price."""
    return None if 0 < amount.ns <= amount.unpriced_ns else amount.nano_usd / 1e9


def _compared(rows: Sequence[LedgerRow], model: str, stable: str, canary: str) -> dict[str, Any]:
    """A canary's cost beside its stable version's; `ratio` is of their direct costs."""

    def arm(version: str) -> Mapping[str, Any]:
        group, loads = _Group(), _loads(rows)
        for row in rows:
            if (row.model, row.version) == (model, version):
                group.add(row, loads.get((model, version)))
        shown = _shown(group, None, None)
        return {"version": version, "requests": shown["requests"], **shown["usd_per_1000"]}

    arms = {"stable": arm(stable), "canary": arm(canary)}
    costs = arms["stable"]["direct"], arms["canary"]["direct"]
    ratio = costs[1] / costs[0] if costs[0] and costs[1] is not None else None
    return {"model": model, **arms, "ratio": ratio}
