"""What `serving cost` makes of budgets."""

from __future__ import annotations

import csv
from typing import Any

from rich.console import Console

from serving.cli.cost import _as_csv
from serving.cli.cost_render import cost_table
from serving.cli.rollout_text import moment
from serving.control.cost_views import cost_view
from serving.store.ledger import LedgerRow

SECOND = 10**9
ROW = LedgerRow(60, "a", "m", "1", "cpu", "direct", 2 * SECOND, SECOND, 0, 10)


def budget(tenant: str, spent: float) -> dict[str, Any]:
    left = {"spent_usd": spent, "left_usd": max(0.0, 3.0 - spent)}
    return {"tenant": tenant, "usd_per_day": 3.0, **left, "renews_at": 86_400}


def view(*by: str, spent: float = 2.0) -> dict[str, Any]:
    budgets = [budget("a", spent), budget("b", 0.0)]
    return cost_view(
        [ROW], by, since=None, now=120.0, grid_gco2e_per_kwh=None, budgets=budgets
    )  # fmt: skip


def printed(found: dict[str, Any]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(cost_table(found, "24h"))
    return capture.get()


def test_the_table_says_what_is_left_today() -> None:
    lines = [line.split() for line in printed(view("tenant")).splitlines()]
    assert ["a", "3", "2", "1"] in lines
    assert ["b", "3", "0.00", "3"] in lines
    assert f"renew at {moment(86_400)}" in printed(view("tenant"))
    assert ["a", "3", "4", "spent"] in [
        line.split() for line in printed(view("tenant", spent=4.0)).splitlines()
    ]
    assert "budget" not in printed(view("model"))
    nothing = {**view("tenant"), "groups": []}
    assert "nothing has run in the last 24h" in printed(nothing)
    assert ["a", "3", "2", "1"] in [line.split() for line in printed(nothing).splitlines()]


def test_the_csv_has_it_too() -> None:
    [row] = csv.DictReader(_as_csv(view("tenant", "kind")).splitlines())
    assert (row["budget_usd_per_day"], row["budget_left_usd"]) == ("3.0", "1.0")
    [row] = csv.DictReader(_as_csv(view("model")).splitlines())
    assert "budget_usd_per_day" not in row
