"""What `serving cost` prints. It imports rich, so the command imports it when it runs."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from serving.cli.render import grid
from serving.cli.rollout_text import moment
from serving.core.ledger_accounts import Kind


def cost_table(found: dict[str, Any], since: str) -> RenderableType:
    """A table with a row a group, the total, and notes on what is not in it."""
    budgets = found["budgets"] if "tenant" in found["by"] else []
    shown = [_budget_table(budgets)] if budgets else []
    if not found["groups"]:
        idle = "nothing has run" if since == "all" else f"nothing has run in the last {since}"
        return Group(Text(idle), *shown)
    kinds = [kind.value for kind in Kind if kind.value in found["total"]["kinds"]]
    by = found["by"]
    # Estimates, so not where nothing is measured.
    energies = {
        head: name
        for head, name in (("Wh, about", "energy_wh_estimate"), ("gCO₂e", "gco2e_estimate"))
        if found["total"][name] is not None
    }
    table = grid(
        *by, "requests", "$/1000 direct", "$/1000 loaded", "idle", "$ total",
        *(f"$ {kind}" for kind in kinds if "kind" not in by), "$ a month", *energies,
    )  # fmt: skip
    for group in [*found["groups"], *([found["total"]] if len(found["groups"]) > 1 else [])]:
        names = [group[name] or "–" for name in by] if by and by[0] in group else _total(by)
        per = group["usd_per_1000"]
        table.add_row(
            *names,
            f"{group['requests']:,}",
            dollars(per["direct"]),
            dollars(per["loaded"]),
            "–" if group["idle_share"] is None else f"{group['idle_share']:.1%}",
            _spent(group),
            *(_spent(group["kinds"].get(kind)) for kind in kinds if "kind" not in by),
            _partly(group, group["usd_per_month"]),
            *(_estimate(group[name]) for name in energies.values()),
        )
    return Group(table, *(Text(line) for line in _notes(found)), *shown)


def _budget_table(budgets: list[dict[str, Any]]) -> RenderableType:
    """What each tenant may still spend today."""
    table = grid("tenant", numbers=("$ budget a day", "$ spent today", "$ left"))
    for row in budgets:
        left = "spent" if not row["left_usd"] else dollars(row["left_usd"])
        table.add_row(row["tenant"], dollars(row["usd_per_day"]), dollars(row["spent_usd"]), left)
    renews = moment(budgets[0]["renews_at"])
    return Group(table, Text(f"budgets are of direct cost, and renew at {renews}"))


def dollars(usd: float | None) -> str:
    """An amount with at least three digits that say something; a dash for none."""
    if usd is None:
        return "–"
    return f"{usd:,.2f}" if abs(usd) >= 100 or usd == 0 else f"{usd:,.4g}"


def _estimate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _total(by: list[str]) -> list[str]:
    return ["total", *([""] * (len(by) - 1))] if by else []


def _spent(found: dict[str, Any] | None) -> str:
    """Dollars; the time instead where none of it has a price."""
    if found is None:
        return "–"
    if found["usd"] is None:
        return f"unpriced {found['unpriced_seconds']:,.0f} s"
    return _partly(found, found["usd"])


def _partly(found: dict[str, Any], usd: float | None) -> str:
    """Dollars; marked where they are not all, as some of the time has no price."""
    return dollars(usd) + ("*" if found["unpriced_seconds"] and usd is not None else "")


def _notes(found: dict[str, Any]) -> list[str]:
    total, notes = found["total"], []
    if total["unpriced_seconds"]:
        notes.append(
            f"* and {total['unpriced_seconds']:,.0f} s of devices that have no price: see "
            "cost.prices, or set usd_per_hour"
        )
    if total["energy_wh_estimate"] is not None:
        emitted = total["gco2e_estimate"]
        grams = "" if emitted is None else f", {emitted:,.4g} gCO₂e"
        notes.append(f"energy of GPUs, estimated: {total['energy_wh_estimate']:,.4g} Wh{grams}")
    for rollout in found["rollouts"]:
        stable, canary, ratio = rollout["stable"], rollout["canary"], rollout["ratio"]
        compared = "no comparison yet" if ratio is None else f"{ratio:.3g} times stable's"
        notes.append(
            f"rollout of {rollout['model']}, $ per 1,000 direct: canary {canary['version']} "
            f"{dollars(canary['direct'])}, stable {stable['version']} "
            f"{dollars(stable['direct'])}: {compared}"
        )
    if total["usd_per_month"] is not None:
        notes.append("$ a month: at the pace of this time, 730 hours")
    return notes
