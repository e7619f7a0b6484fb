"""What `serving tune` prints. It imports rich, so the command imports it when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from serving.cli.cost_render import dollars
from serving.cli.render import grid
from serving.core.tuning import Measurement, Objective, frontier, patch

if TYPE_CHECKING:
    from serving.replica.tuning import Tuned


def report(
    model: str,
    version: str,
    tuned: Tuned,
    objective: Objective,
    chosen: Measurement | None,
    buckets: Sequence[int] | None,
) -> dict[str, Any]:
    """Everything as plain JSON types: what was measured, its frontier, the choice, the patch."""
    return {
        "model": model,
        "version": version,
        "device": tuned.device,
        "objective": _said(objective),
        "percentile": objective.percentile,
        "measured": [m.to_dict() for m in tuned.found],
        "frontier": [m.to_dict() for m in frontier(tuned.found, objective.percentile)],
        "left_out": tuned.left_out,
        "chosen": None if chosen is None else chosen.to_dict(),
        "patch": None if chosen is None else patch(model, chosen, buckets),
    }


def tuned_view(found: dict[str, Any]) -> RenderableType:
    """The frontier as a table, the choice in a sentence, the patch as YAML."""
    percentile = found["percentile"]
    others = dict.fromkeys(("p50", percentile))
    table = grid(
        "", "precision",
        numbers=("replicas", "max_size", "in flight", "rows a run", "rows/s",
                 *(f"{name} ms" for name in others), "$ a million"),
    )  # fmt: skip
    for row in found["frontier"]:
        table.add_row(
            "→" if row == found["chosen"] else "",
            row["precision"],
            str(row["instances"]),
            str(row["max_size"]),
            str(row["concurrency"]),
            f"{row['mean_rows']:.1f}",
            f"{row['throughput']:,.0f}",
            *(f"{row['latency_ms'][name]:.3g}" for name in others),
            "unpriced" if row["usd_per_million"] is None else dollars(row["usd_per_million"]),
        )
    title = Text(f"{found['model']} version {found['version']} on {found['device']}")
    lines = [Text(f"left out: {line}", style="yellow") for line in found["left_out"]]
    return Group(title, table, *lines, *_advice(found))


def _advice(found: dict[str, Any]) -> list[Text]:
    chosen = found["chosen"]
    if chosen is None:
        return []
    dear = "cheapest" if chosen["usd_per_million"] is not None else "fastest"
    return [
        Text(
            f"{dear} for {found['objective']}: {chosen['throughput']:,.0f} rows/s with "
            f"{chosen['concurrency']} in flight. This is the replicas' part: HTTP and the gateway "
            "come on top\n"
        ),
        Text(yaml.safe_dump(found["patch"], sort_keys=False, default_flow_style=None).rstrip()),
    ]


def _said(objective: Objective) -> str:
    parts = []
    if objective.limit_s is not None:
        parts.append(f"{objective.percentile} ≤ {1e3 * objective.limit_s:g} ms")
    if objective.max_usd_per_million is not None:
        parts.append(f"{objective.max_usd_per_million:g} USD a million")
    return " and ".join(parts) or "any latency and cost"
