"""Metrics of what everything costs, and of what tenants may spend."""

from __future__ import annotations

from typing import Final

from serving.metrics.family import VERSION, Metric

_ACCOUNT: Final = (*VERSION, "tenant", "device", "kind")
COST: Final = Metric(
    "serving_cost_usd",
    "counter",
    "What everything has cost by kind: direct, padding, failed, shadow, warmup, idle, unallocated. "
    "Only what has a price.",
    _ACCOUNT,
)
COST_SECONDS: Final = Metric(
    "serving_cost_device_seconds", "counter", "The device time behind each cost.", _ACCOUNT
)
COST_UNPRICED: Final = Metric(
    "serving_cost_unpriced_seconds",
    "counter",
    "Device time whose price is not known, and which is in no cost.",
    _ACCOUNT,
)
COST_REQUESTS: Final = Metric(
    "serving_cost_requests", "counter", "Requests that a cost was for.", _ACCOUNT
)
COST_ENERGY: Final = Metric(
    "serving_cost_energy_joules",
    "counter",
    "Energy by share of a GPU's time; an estimate. Absent where it is not measured.",
    _ACCOUNT,
)
COST_EMISSIONS: Final = Metric(
    "serving_cost_emissions_grams",
    "counter",
    "CO2 equivalent of that energy, by cost.grid_gco2e_per_kwh; an estimate.",
    _ACCOUNT,
)
COST_PRICE: Final = Metric(
    "serving_replica_price_usd_per_hour",
    "gauge",
    "What a replica costs an hour; absent where it is not known.",
    (*VERSION, "replica"),
)

TENANT_BUDGET: Final = Metric(
    "serving_tenant_budget_usd",
    "gauge",
    "What a tenant may spend a UTC day; absent without a bound.",
    ("tenant",),
)
TENANT_SPENT: Final = Metric(
    "serving_tenant_spent_usd",
    "gauge",
    "Direct cost of a tenant since midnight UTC, of tenants with a budget.",
    ("tenant",),
)

METRICS: Final = (
    COST,
    COST_SECONDS,
    COST_UNPRICED,
    COST_REQUESTS,
    COST_ENERGY,
    COST_EMISSIONS,
    COST_PRICE,
    TENANT_BUDGET,
    TENANT_SPENT,
)
