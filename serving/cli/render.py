"""What the commands print. It imports rich, so the commands import it when they run."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from serving.cli.rollout_text import moment, percent, state

_STATE_STYLES: Final = {
    "ready": "green",
    "asleep": "blue",
    "waking": "yellow",
    "starting": "yellow",
    "replacing": "yellow",
    "leaving": "yellow",
    "degraded": "yellow",
    "failed": "red",
    "unavailable": "red",
}
_PIPED_WIDTH: Final = 200


def console() -> Console:
    """Standard output; wide where it is not a terminal, so that nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def show_view(view: RenderableType) -> None:
    """Print to standard output."""
    console().print(view)


def short(digest: str) -> str:
    """A digest as people read it."""
    return digest.removeprefix("sha256:")[:12]


def milliseconds(seconds: float | None) -> str:
    """A duration, or a dash for none."""
    return "–" if seconds is None else f"{seconds * 1e3:.2f}"


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """What an apply starts, stops and leaves alone."""
    if not plan["changes"]:
        return Text("nothing runs, nothing is asked for")
    table = grid("change", "model", "version", "default", "digest", "why")
    for row in plan["changes"]:
        default = "yes" if row["default"] else ""
        table.add_row(
            row["change"],
            row["model"],
            row["version"],
            default,
            short(row["digest"]),
            Text(row["reason"]),
        )
    return table


def status_view(status: dict[str, Any]) -> RenderableType:
    """What runs, what it has answered, what is wrong, and where everything is."""
    versions = [(m, v) for m in status["models"] for v in m["versions"]]
    return Group(
        _replicas_table(versions),
        _traffic_table(versions),
        *(Text(line) for line in _rollouts(status)),
        *(Text(line) for line in _scaling(versions)),
        *(Text(line, style="red") for line in _complaints(status)),
        *(Text(line) for line in _places(status)),
    )


def _replicas_table(versions: list[tuple[dict[str, Any], dict[str, Any]]]) -> RenderableType:
    table = grid("model", "version", "state", "ready", "digest", "runtime", "device")
    for model, v in versions:
        table.add_row(
            model["name"],
            v["version"] + _role(model, v["version"]),
            Text(v["state"], style=_STATE_STYLES.get(v["state"], "")),
            f"{v['ready']}/{v['wanted']}",
            short(v["digest"]),
            v["platform"],
            v["device"] or "–",
        )
    return table


def _role(model: dict[str, Any], version: str) -> str:
    """Which requests a version gets: the model's, or in a rollout its share of them."""
    rollout = model["rollout"]
    for arm, share in _shares(rollout):
        if rollout[arm] == version:
            return f" ({arm}, {percent(share)})"
    return " (default)" if version == model["version"] and rollout is None else ""


def _shares(rollout: dict[str, Any] | None) -> tuple[tuple[str, float], ...]:
    if rollout is None:
        return ()
    return (("stable", 1 - rollout["weight"]), ("canary", rollout["weight"]))


def _rollouts(status: dict[str, Any]) -> list[str]:
    """Where each rollout that runs is, and what shows more of it."""
    return [_rollout(m["name"], m["rollout"]) for m in status["models"] if m["rollout"]]


def _rollout(model: str, rollout: dict[str, Any]) -> str:
    at, steps = rollout["step"] + 1, rollout["steps"]
    place = f"step {at} of {steps}, " if 0 < at <= steps and rollout["weight"] < 1 else ""
    return (
        f"{model}: rollout {rollout['id']} is {state(rollout)}, {place}"
        f"{percent(rollout['weight'])} to version {rollout['canary']}; "
        f"serving rollout status {model} says more"
    )


def _traffic_table(versions: list[tuple[dict[str, Any], dict[str, Any]]]) -> RenderableType:
    numbers = ("requests", "errors", "queue", "in flight", "batch", "p50 ms", "p99 ms")
    table = grid("model", "version", numbers=numbers)
    for model, v in versions:
        table.add_row(
            model["name"],
            v["version"],
            str(v["requests"]),
            str(v["errors"]),
            str(v["queue_depth"]),
            str(v["in_flight"]),
            "–" if v["mean_batch"] is None else f"{v['mean_batch']:.1f}",
            milliseconds(v["p50_s"]),
            milliseconds(v["p99_s"]),
        )
    return table


def _scaling(versions: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Why versions whose replicas follow their load have so many."""
    return [
        f"{model['name']} version {v['version']}: {v['wanted']} replicas "
        f"({v['scaling']['min']} to {v['scaling']['max']}): {v['scaling']['reason']}"
        for model, v in versions
        if v["scaling"] and v["scaling"]["reason"]
    ]


def _complaints(status: dict[str, Any]) -> list[str]:
    lines = [
        f"{model['name']} version {v['version']}: {v['last_error']}"
        for model in status["models"]
        for v in model["versions"]
        if v["last_error"]
    ]
    if status["controller"]["last_error"]:
        lines.append(f"controller: {status['controller']['last_error']}")
    return lines


def _places(status: dict[str, Any]) -> list[str]:
    controller, urls = status["controller"], status["urls"]
    gateways = ", ".join(
        f"{g['gateway']} (process {g['pid']}, revision {g['revision']})" for g in status["gateways"]
    )
    return [
        f"gateways: {gateways or 'none'}",
        f"controller: process {controller['pid']}, revision {controller['revision']}, "
        f"apply {status['apply']['id']} {status['apply']['state']}",
        f"inference {urls['inference']}   metrics {urls['metrics']}",
    ]


def grid(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table; `numbers` are columns to the right, aligned there."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def registry_table(versions: list[dict[str, Any]]) -> RenderableType:
    """Registered versions, one a line."""
    table = grid("model", "version", "aliases", "platform", "digest", "metrics", "created")
    for v in versions:
        metrics = ", ".join(f"{key}={value:g}" for key, value in sorted(v["metrics"].items()))
        aliases = " ".join(f"@{alias}" for alias in v["aliases"])
        platform = v["platform"] or "not registered with `serving register`"
        created = moment(datetime.fromisoformat(v["created_at"]).timestamp())
        table.add_row(
            v["name"], v["version"], aliases, platform, short(v["digest"]), metrics, created
        )
    return table


def version_view(version: dict[str, Any]) -> RenderableType:
    """Everything about one registered version."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    data, signature = version["dataset"], version["signature"]
    trained = version["training_time_s"]
    rows = {
        "model": f"{version['name']} version {version['version']}",
        "aliases": " ".join(f"@{alias}" for alias in version["aliases"]) or "–",
        "digest": version["digest"] or "–",
        "platform": version["platform"] or "–",
        "metrics": ", ".join(f"{k}={v:g}" for k, v in sorted(version["metrics"].items())) or "–",
        "data set": f"{data['name']} {data['uri']} {data['digest']}" if data else "–",
        "training": "–" if trained is None else f"{trained:.1f} s",
        "created": moment(datetime.fromisoformat(version["created_at"]).timestamp()),
        "source": version["source"],
    }
    for key, value in rows.items():
        table.add_row(key, value)
    for side in ("inputs", "outputs") if signature else ():
        for tensor in signature[side]:
            shape = ", ".join(str(d) for d in tensor["shape"])
            table.add_row(side[:-1], f"{tensor['name']} {tensor['datatype']} [{shape}]")
    if signature:
        table.add_row("batch", signature["batch"])
    return table


class Progress:
    """Prints each change of a version's state as one line."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], str] = {}

    def __call__(self, status: dict[str, Any]) -> None:
        """Take the next status."""
        for model in status["models"]:
            for v in model["versions"]:
                key = (model["name"], v["version"])
                state = f"{v['state']} ({v['ready']}/{v['wanted']})"
                if self._seen.get(key) != state:
                    self._seen[key] = state
                    sys.stdout.write(f"{model['name']} version {v['version']}: {state}\n")
                    sys.stdout.flush()
