"""What `serving cost` makes of budgets, and of what has no price."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
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


def view(*by: str, spent: float = 2.0, rows: Sequence[LedgerRow] = (ROW,)) -> dict[str, Any]:
    budgets = [budget("a", spent), budget("b", 0.0)]
    return cost_view(rows, by, since=None, now=120.0, grid_gco2e_per_kwh=None, budgets=budgets)


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


def test_what_has_no_price_is_nowhere_zero_dollars() -> None:
    unpriced = replace(ROW, device="GPU-2", nano_usd=0, unpriced_ns=SECOND)
    found = view("gpu", rows=[ROW, unpriced])
    without, priced = csv.DictReader(_as_csv(found).splitlines())
    assert {name: without[name] for name in ("usd", "usd_per_month", "usd_direct")} == {
        "usd": "", "usd_per_month": "", "usd_direct": ""
    }  # fmt: skip
    assert (priced["usd"], priced["usd_direct"]) == ("2.0", "2.0")
    lines = [line.split() for line in printed(found).splitlines()]
    [line] = [line for line in lines if line[:1] == ["GPU-2"]]
    assert line[1:] == ["10", "–", "–", "0.0%", "unpriced", "1", "s", "unpriced", "1", "s", "–"]
    # What is known of a total is marked, as it is not all.
    [total] = [line for line in lines if line[:1] == ["total"]]
    assert total[-3:] == ["2*", "2*", "87,600.00*"]
