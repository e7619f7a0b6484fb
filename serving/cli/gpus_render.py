"""What `serving gpus` prints. It imports rich, so the command imports it when it runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from serving.cli.client import Admin
from serving.cli.render import console, grid, show_view
from serving.errors import ClusterError

POLL_S: Final = 1.0

_GIB: Final = 1 << 30
_SHORT: Final = 12
_STYLES: Final = {
    "ok": "green",
    "throttled": "yellow",
    "unknown": "yellow",
    "degraded": "yellow",
    "failed": "red",
}
_NUMBERS: Final = ("leased", "used", "free", "of GiB", "load", "W", "°C", "$/h")


def gpus_table(found: dict[str, Any]) -> RenderableType:
    """One line a GPU or slice, and below them what is wrong."""
    lines = list(_remarks(found))
    if not found["gpus"]:
        return Group(Text("no GPU on any node"), *lines)
    table = grid("gpu", "node", "type", "health", "runs", numbers=_NUMBERS)
    for gpu in found["gpus"]:
        table.add_row(*_row(gpu))
    return Group(table, *lines)


def follow(admin: Admin, *, as_json: bool) -> None:
    """Show them again each second, until interrupted. Raises `OperatorError`."""
    if as_json or not sys.stdout.isatty():
        for found in _looks(admin):
            if as_json:
                sys.stdout.write(json.dumps(found) + "\n")
            else:
                show_view(gpus_table(found))
            sys.stdout.flush()
        return
    with Live(console=console(), auto_refresh=False) as live:
        for found in _looks(admin):
            live.update(gpus_table(found), refresh=True)


def _looks(admin: Admin) -> Iterator[dict[str, Any]]:
    yield admin.gpus()
    while True:
        time.sleep(POLL_S)
        try:
            yield admin.gpus()
        except ClusterError as error:
            raise ClusterError(f"the controller has gone away: {error}") from error


def _row(gpu: dict[str, Any]) -> list[Text | str]:
    sample, memory = gpu["sample"] or {}, gpu["memory"]
    health = Text(gpu["health"], style=_STYLES[gpu["health"]])
    if gpu["cordon"]:
        health.append(", cordoned", style="red")
    name = gpu["uuid"][:_SHORT]
    return [
        f"  {name}" if gpu["mig_parent"] else f"{gpu['index']} {name}",
        gpu["host"],
        gpu["name"].removeprefix("NVIDIA "),
        health,
        Text(_runs(gpu)),
        *(_gib(memory[key]) for key in ("leased", "used", "free", "total")),
        _percent(sample.get("utilization")),
        _whole(sample.get("power_w")),
        _whole(sample.get("temperature_c")),
        "unpriced" if gpu["usd_per_hour"] is None else f"{gpu['usd_per_hour']:.2f}",
    ]


def _runs(gpu: dict[str, Any]) -> str:
    if gpu["divided"]:
        return "its slices"
    ours = [f"{r['model']}/{r['version']}" for r in gpu["replicas"]]
    counted = [f"{name} ×{ours.count(name)}" for name in dict.fromkeys(ours)]
    others = gpu["other_processes"]
    if others:
        counted.append(f"{len(others)} other process{'es' if len(others) > 1 else ''}")
    return ", ".join(counted) or "–"


def _remarks(found: dict[str, Any]) -> Iterator[Text]:
    for gpu in found["gpus"]:
        name = f"{gpu['host']}: {gpu['uuid'][:_SHORT]}"
        if gpu["reasons"]:
            yield Text(f"{name}: {'; '.join(gpu['reasons'])}", style=_STYLES[gpu["health"]])
        if gpu["cordon"] and gpu["cordon"]["uuid"] == gpu["uuid"]:
            yield Text(f"{name}: {_cordoned(gpu['cordon'])}", style="red")
        stays = {f"{r['model']}/{r['version']} stays: {r['stays']}": None
                 for r in gpu["replicas"] if r["stays"]}  # fmt: skip
        yield from (Text(f"{name}: {why}", style="yellow") for why in stays)
    for node in found["nodes"]:
        if node["problem"]:
            yield Text(f"node {node['host'] or node['node']}: {node['problem']}", style="yellow")
    for row in found["absent"]:
        yield Text(f"{row['uuid']}, on no node now: {_cordoned(row)}", style="red")


def _cordoned(row: dict[str, Any]) -> str:
    why = f": {row['reason']}" if row["reason"] else ""
    return f"cordoned by {row['actor']}{why}"


def _gib(size: float | None) -> str:
    return "–" if size is None else f"{size / _GIB:.1f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.0f} %"


def _whole(number: float | None) -> str:
    return "–" if number is None else f"{number:.0f}"
