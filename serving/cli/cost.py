"""`serving cost`: what was spent, on what, and what an inference costs."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Annotated, Any, Final

import typer

from serving.cli.cluster import ConfigFile, Url
from serving.cli.models import AsJson

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPAN: Final = re.compile(r"([1-9][0-9]{0,8})([smhd])")


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(cost)


def cost(
    by: Annotated[
        str,
        typer.Option(help="What to add up by: model, version, tenant, gpu, kind; comma-separated."),
    ] = "model,version",
    since: Annotated[
        str, typer.Option(help="How far back, to the minute: 30m, 24h, 7d; or all.")
    ] = "24h",
    file: ConfigFile = None,
    url: Url = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One row a group, as CSV.")] = False,
) -> None:
    """Show what everything cost, and what 1,000 successful inferences cost."""
    from serving.cli.client import Admin
    from serving.cli.home import admin_url
    from serving.errors import ConfigError

    if as_json and as_csv:
        raise ConfigError("--json and --csv: choose one")
    seconds = _seconds(since)
    found = Admin(admin_url(url, file)).cost(by, seconds)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif as_csv:
        typer.echo(_as_csv(found), nl=False)
    else:
        from serving.cli.cost_render import cost_table
        from serving.cli.render import show_view

        show_view(cost_table(found, since))


def _seconds(since: str) -> int | None:
    from serving.errors import ConfigError

    if since == "all":
        return None
    match = _SPAN.fullmatch(since)
    if match is None:
        raise ConfigError(f"--since {since!r}; allowed: a time such as 30m, 24h or 7d, or all")
    return int(match[1]) * _UNITS[match[2]]


def _as_csv(found: dict[str, Any]) -> str:
    """One line a group; empty where there is no number."""
    from serving.core.ledger_accounts import Kind

    text = io.StringIO()
    numbers = [
        "usd", "requests", "usd_per_1000_direct", "usd_per_1000_loaded", "idle_share",
        "usd_per_month", "seconds", "unpriced_seconds", "energy_wh_estimate", "gco2e_estimate",
    ]  # fmt: skip
    kinds = [kind.value for kind in Kind]
    of_tenants = ["budget_usd_per_day", "budget_left_usd"] if "tenant" in found["by"] else []
    budgets = {row["tenant"]: row for row in found["budgets"]}
    fields = [*found["by"], *numbers, *(f"usd_{kind}" for kind in kinds), *of_tenants]
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    for group in found["groups"]:
        per = {f"usd_per_1000_{name}": usd for name, usd in group["usd_per_1000"].items()}
        spent = {f"usd_{kind}": amount["usd"] for kind, amount in group["kinds"].items()}
        budget = budgets.get(group.get("tenant"), {})
        of_tenant = {
            "budget_usd_per_day": budget.get("usd_per_day"),
            "budget_left_usd": budget.get("left_usd"),
        }
        row = {**group, **per, **spent, **of_tenant}
        writer.writerow({name: row.get(name) for name in writer.fieldnames})
    return text.getvalue()
