"""What is printed of a placement. It imports rich, so the commands import it when they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from serving.cli.render import grid
from serving.core.memory_profile import format_free, format_need
from serving.errors import ConflictError


def placement_view(plan: Mapping[str, Any]) -> RenderableType:
    """Every application with its GPUs, every GPU with its memory, and what does not fit."""
    if not plan["models"]:
        return Text("nothing runs, nothing is asked for")
    if not plan["gpus"]:
        return Group(_models(plan), Text("no GPU is known: nothing is placed by memory"))
    refused = [Text(refusal(row), style="red") for row in plan["models"] if row["refused"]]
    stay = [Text(staying(row), style="yellow") for row in plan["models"] if row["stays"]]
    learned = [Text(line) for row in plan["models"] for line in ceilings(row)]
    return Group(_models(plan), _gpus(plan), *learned, *refused, *stay)


def ceilings(row: Mapping[str, Any]) -> list[str]:
    """How many rows a version's runs have at most, where larger ones ran out of memory."""
    return [
        f"{row['model']} version {row['version']}: runs have at most {rows} rows on {kind}, "
        "as larger ones ran out of memory"
        for kind, rows in sorted(row["ceilings"].items())
    ]


def refusal(row: Mapping[str, Any]) -> str:
    """Why an application gets no GPU, or not all that it wants."""
    return f"{row['model']} version {row['version']}: {row['refused']}"


def staying(row: Mapping[str, Any]) -> str:
    """Why an application's replicas do not leave a cordoned GPU."""
    return f"{row['model']} version {row['version']} stays on a cordoned GPU: {row['stays']}"


def refuse_what_does_not_fit(plan: Mapping[str, Any]) -> None:
    """Raise `ConflictError` where an apply would be refused."""
    refused = [refusal(row) for row in plan["models"] if row["new"] and row["refused"]]
    if refused:
        raise ConflictError(f"this would be refused: {'; '.join(refused)}")


def _models(plan: Mapping[str, Any]) -> RenderableType:
    table = grid("model", "version", "replicas", "memory each", "measured", "where")
    for row in plan["models"]:
        version = f"{row['version']} (new)" if row["new"] else row["version"]
        size = "–" if row["bytes"] is None else format_need(row["bytes"])
        table.add_row(
            row["model"], version, str(row["replicas"]), size, _measured(row), Text(_where(row))
        )
    return table


def _measured(row: Mapping[str, Any]) -> str:
    if row["bytes"] is None:
        return "–"
    return "estimated" if row["estimated"] else row["basis"]


def _where(row: Mapping[str, Any]) -> str:
    if row["bytes"] is None:
        return "CPU"
    slots = [
        slot["uuid"] if slot["replica"] is not None else f"{slot['uuid']} (to come)"
        for slot in row["slots"]
    ]
    return ", ".join(slots) or "nowhere"


def _gpus(plan: Mapping[str, Any]) -> RenderableType:
    numbers = ("total", "leased", "to come", "others", "free")
    table = grid("gpu", "type", "state", numbers=numbers)
    for gpu in plan["gpus"]:
        keys = ("memory", "leased", "planned", "others", "free")
        sizes = [format_free(gpu[f"{key}_bytes"]) for key in keys]
        table.add_row(gpu["uuid"], gpu["type"], _state(gpu), *sizes)
    return table


def _state(gpu: Mapping[str, Any]) -> RenderableType:
    if gpu["cordoned"]:
        return Text("cordoned", style="red")
    return Text("last resort", style="yellow") if gpu["throttled"] else Text("ok", style="green")
