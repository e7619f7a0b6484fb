"""What the ledger's rows say: per inference, by tenant, a month, and of a canary."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from serving.cli.cost_render import cost_table
from serving.control.cost_metrics import CostMetrics
from serving.control.cost_views import cost_view
from serving.core.ledger_accounts import Account, Amount, Kind
from serving.store.ledger import LedgerRow

SECOND = 10**9
NOW = 7200.0


def row(kind: str, usd: float, **more: Any) -> LedgerRow:
    fields = {"minute": 3600, "tenant": "", "model": "m", "version": "1", "device": "cpu"}
    numbers = {"nano_usd": round(usd * 1e9), "ns": SECOND, "unpriced_ns": 0, "requests": 0}
    return LedgerRow(kind=kind, **{**fields, **numbers, **more})


ROWS = [
    row("direct", 3.0, tenant="acme", requests=3000, ns=3 * SECOND),
    row("direct", 1.0, tenant="default", requests=500),
    row("idle", 2.0, ns=4 * SECOND),
    row("padding", 1.5),
    row("warmup", 0.5),
    row("shadow", 4.0),
]


def view(rows: list[LedgerRow], *by: str, **more: Any) -> dict[str, Any]:
    settings = {"since": None, "now": NOW, "grid_gco2e_per_kwh": None, **more}
    return cost_view(rows, by, **settings)


def test_direct_and_loaded() -> None:
    [group] = view(ROWS, "model", "version")["groups"]
    assert group["usd"] == 12.0
    # 4 dollars of direct cost carry 4 of idle, padding and warm-up; shadow traffic is not theirs.
    assert group["usd_per_1000"] == {"direct": 4.0 / 3.5, "loaded": 8.0 / 3.5}
    assert group["idle_share"] == pytest.approx(4 / 11)
    # An hour of this, 730 times.
    assert group["usd_per_month"] == pytest.approx(12.0 * 730)


def test_a_tenant_carries_its_part_of_the_load() -> None:
    groups = {g["tenant"]: g["usd_per_1000"] for g in view(ROWS, "tenant")["groups"]}
    assert groups["acme"] == {"direct": 1.0, "loaded": 2.0}
    assert groups["default"] == {"direct": 2.0, "loaded": 4.0}
    assert groups[""] == {"direct": None, "loaded": None}


def test_without_an_inference_nothing_is_divided() -> None:
    [group] = view([row("idle", 2.0)], "model")["groups"]
    assert group["usd_per_1000"] == {"direct": None, "loaded": None}
    assert view([], "model")["total"]["idle_share"] is None


def test_what_has_no_price_is_no_zero() -> None:
    rows = [row("direct", 0.0, requests=10, unpriced_ns=SECOND)]
    [group] = view(rows, "model")["groups"]
    assert group["unpriced_seconds"] == 1.0
    assert group["usd_per_1000"] == {"direct": None, "loaded": None}
    assert (group["usd"], group["usd_per_month"]) == (None, None)
    assert group["kinds"]["direct"]["usd"] is None


def test_inferences_without_a_price_make_the_others_no_cheaper() -> None:
    unpriced = row("direct", 0.0, device="GPU-2", requests=3000, unpriced_ns=SECOND)
    rows = [row("direct", 4.0, requests=1000), row("idle", 2.0), unpriced]
    [group] = view(rows, "model", "version")["groups"]
    assert group["usd_per_1000"] == {"direct": 4.0, "loaded": 6.0}
    assert group["requests"] == 4000
    # A price that came in the middle of a minute holds for as many of its requests.
    half = row("direct", 4.0, requests=2000, ns=2 * SECOND, unpriced_ns=SECOND)
    assert view([half])["total"]["usd_per_1000"] == {"direct": 4.0, "loaded": 4.0}


def test_energy_is_an_estimate_where_it_is_measured() -> None:
    assert view(ROWS)["total"]["energy_wh_estimate"] is None
    rows = [*ROWS, row("idle", 0.0, device="GPU-1", energy_mj=3_600_000)]
    found = view(rows, "gpu", grid_gco2e_per_kwh=400.0)
    by_gpu = {g["gpu"]: (g["energy_wh_estimate"], g["gco2e_estimate"]) for g in found["groups"]}
    assert by_gpu == {"cpu": (None, None), "GPU-1": (1.0, 0.4)}
    assert view(rows)["total"]["gco2e_estimate"] is None


def test_a_canary_beside_its_stable_version() -> None:
    rows = [*ROWS, row("direct", 3.0, version="2", requests=1000)]
    [found] = view(rows, rollouts=[("m", "1", "2")])["rollouts"]
    assert found["canary"]["direct"] == 3.0
    assert found["ratio"] == pytest.approx(3.0 / (4.0 / 3.5))
    [found] = view(ROWS, rollouts=[("m", "1", "2")])["rollouts"]
    assert found["ratio"] is None


def test_counters_do_not_fall_when_a_cost_is_corrected() -> None:
    """A reader of counters takes a fall for a restart of everything that was counted."""
    metrics, account = CostMetrics(), Account("", "m", "1", "cpu", Kind.FAILED)

    def shown(nano: int) -> float:
        dollars = next(iter(metrics.families({account: Amount(nano, SECOND)}, {}, None)))
        return float(dollars.samples[0].value)

    assert [shown(n) for n in (5 * SECOND, 3 * SECOND, 6 * SECOND)] == [5.0, 5.0, 6.0]


def test_energy_and_emissions_are_metrics_where_they_are_known() -> None:
    account = Account("", "m", "1", "GPU-1", Kind.IDLE)
    totals = {account: Amount(1, SECOND, energy_mj=7_200_000)}

    def shown(grid: float | None) -> dict[str, list[float]]:
        families = CostMetrics().families(totals, {}, grid)
        return {f.name: [s.value for s in f.samples] for f in families}

    found = shown(400.0)
    assert found["serving_cost_energy_joules"] == [7200.0]
    assert found["serving_cost_emissions_grams"] == [pytest.approx(0.8)]
    assert shown(None)["serving_cost_emissions_grams"] == []


def test_the_table_has_energy_where_it_is_measured() -> None:
    def printed(found: dict[str, Any]) -> str:
        text = StringIO()
        Console(width=200, file=text, color_system=None).print(cost_table(found, "1h"))
        return text.getvalue()

    assert "Wh" not in printed(view(ROWS, "gpu"))
    rows = [*ROWS, row("idle", 0.0, device="GPU-1", energy_mj=3_600_000)]
    assert "gCO₂e" not in printed(view(rows, "gpu"))
    lines = printed(view(rows, "gpu", grid_gco2e_per_kwh=400.0)).splitlines()
    lines = [line.rstrip() for line in lines]
    ends = {line.split()[0]: line.split()[-2:] for line in lines if line.endswith(("0.4", "–"))}
    assert ends == {"GPU-1": ["1", "0.4"], "cpu": ["–", "–"], "total": ["1", "0.4"]}
