"""What tenants have spent today (UTC) of what they may, and who is to spend no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from serving.core.ledger_accounts import Account, Kind
from serving.tenant_settings import TenantsConfig

DAY_S: Final = 86_400


def day_of(unix: float) -> int:
    """The begin of the UTC day that a Unix time is in, as Unix time."""
    return int(unix // DAY_S) * DAY_S


class Spending:
    """The direct cost of one UTC day by tenant, in nano-dollars."""

    def __init__(self, day: int = 0) -> None:
        self._day = day
        self._nano: dict[str, int] = {}

    def add(self, minute: int, account: Account, nano_usd: int) -> None:
        """Count what arose in a minute, which may be a correction of an earlier one."""
        if account.kind is not Kind.DIRECT:
            return
        day = day_of(minute)
        if day > self._day:
            self._day, self._nano = day, {}
        if day == self._day:
            self._nano[account.tenant] = self._nano.get(account.tenant, 0) + nano_usd

    def on(self, day: int) -> dict[str, int]:
        """What was spent that day, if it is the last that is known."""
        return self._nano if day == self._day else {}


class Budgets:
    """The budgets of the configuration, against what is spent."""

    def __init__(self, config: TenantsConfig) -> None:
        self._config = config

    def __bool__(self) -> bool:
        return bool(self._config.budgets)

    def spent(self, spending: Spending, now: float) -> dict[str, dict[str, Any]]:
        """Those whose budget is used up by the Unix time `now`, as gateways are told."""
        return {
            str(row["tenant"]): {
                "budget": row["usd_per_day"],
                "spent": row["spent_usd"],
                "until": row["renews_at"],
            }
            for row in self.rows(spending, now)
            if row["spent_usd"] >= row["usd_per_day"]
        }

    def rows(self, spending: Spending, now: float) -> list[dict[str, Any]]:
        """Every tenant with a budget, by name: dollars a day, spent and left; Unix times."""
        day = day_of(now)
        spent = spending.on(day)
        return [
            {
                "tenant": tenant,
                "usd_per_day": budget,
                "spent_usd": spent.get(tenant, 0) / 1e9,
                "left_usd": max(0.0, budget - spent.get(tenant, 0) / 1e9),
                "renews_at": day + DAY_S,
            }
            for tenant, budget in self._budgets(spent)
        ]

    def _budgets(self, tenants: Iterable[str]) -> list[tuple[str, float]]:
        names = sorted({*tenants, *self._config.listed})
        budgets = [(name, self._config.budget(name)) for name in names]
        return [(name, budget) for name, budget in budgets if budget is not None]
