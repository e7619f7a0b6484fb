"""What an apply's plan says beside its table: rollouts that begin, and versions that are held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def notes(plan: Mapping[str, Any]) -> list[str]:
    """A line for each change that is a rollout of its own, or is not made."""
    return [*rollouts(plan), *holds(plan)]


def rollouts(plan: Mapping[str, Any]) -> list[str]:
    """A line for each rollout that the apply starts, or would."""
    verb = "would start" if plan["dry_run"] else "starts"
    return [
        f"{row['model']}: this {verb} a rollout to version {row['version']}; "
        f"watch it: serving rollout watch {row['model']}"
        for row in plan["changes"]
        if row["change"] == "rollout"
    ]


def holds(plan: Mapping[str, Any]) -> list[str]:
    """A line for each version that is asked for and held: who answers instead, why, what to do."""
    default = {row["model"]: row["version"] for row in plan["changes"] if row["default"]}
    return [
        f"{row['model']}: version {default[row['model']]} answers: "
        f"version {row['version']} {row['reason']}"
        for row in plan["changes"]
        if row["change"] == "held"
    ]
