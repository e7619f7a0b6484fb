"""The ledger as Prometheus metrics: totals by account, since the store was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import Metric as Family

from serving.control.metric_families import family_of
from serving.core.ledger_accounts import Account, Amount, kwh
from serving.metrics import costs as metrics


class CostMetrics:
    """What was shown last is never undercut: a correction waits until its account has grown."""

    def __init__(self) -> None:
        self._shown: dict[tuple[str, Account], float] = {}

    def families(
        self,
        totals: Mapping[Account, Amount],
        prices: Mapping[tuple[str, str, str], float | None],
        grid_gco2e_per_kwh: float | None,
    ) -> Iterator[Family]:
        """Every family of costs. `prices` are those of replicas: (model, version, replica)."""
        dollars, held, unpriced, requests, energy, emissions, price = (
            family_of(metric)
            for metric in (
                metrics.COST,
                metrics.COST_SECONDS,
                metrics.COST_UNPRICED,
                metrics.COST_REQUESTS,
                metrics.COST_ENERGY,
                metrics.COST_EMISSIONS,
                metrics.COST_PRICE,
            )
        )
        for account, amount in sorted(totals.items()):
            labels = [
                account.model, account.version, account.tenant, account.device, account.kind.value
            ]  # fmt: skip
            if amount.ns > amount.unpriced_ns or amount.nano_usd:
                self._add(dollars, account, labels, amount.nano_usd / 1e9)
            self._add(held, account, labels, amount.ns / 1e9)
            if amount.unpriced_ns:
                self._add(unpriced, account, labels, amount.unpriced_ns / 1e9)
            if amount.requests:
                self._add(requests, account, labels, amount.requests)
            if amount.energy_mj is not None:
                self._add(energy, account, labels, amount.energy_mj / 1e3)
                if grid_gco2e_per_kwh is not None:
                    grams = kwh(amount.energy_mj) * grid_gco2e_per_kwh
                    self._add(emissions, account, labels, grams)
        for key, usd_per_hour in sorted(prices.items()):
            if usd_per_hour is not None:
                price.add_metric(key, usd_per_hour)
        yield from (dollars, held, unpriced, requests, energy, emissions, price)

    def _add(self, family: Any, account: Account, labels: list[str], value: float) -> None:
        key = family.name, account
        self._shown[key] = max(self._shown.get(key, 0.0), value)
        family.add_metric(labels, self._shown[key])


def budget_families(budgets: Iterable[Mapping[str, Any]]) -> Iterator[Family]:
    """Every family of budgets, from `Budgets.rows`."""
    budget, spent = family_of(metrics.TENANT_BUDGET), family_of(metrics.TENANT_SPENT)
    for row in budgets:
        budget.add_metric([row["tenant"]], row["usd_per_day"])
        spent.add_metric([row["tenant"]], row["spent_usd"])
    yield from (budget, spent)
