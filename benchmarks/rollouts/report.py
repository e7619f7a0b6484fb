"""Results as JSON, and as Markdown tables that say the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import table

Row = Mapping[str, Any]


_NUMBERS = frozenset({"rollouts", "ramp_s", "false", "upper", "by_trigger", "ended", "delay_s"})


def with_kept(
    name: str, machine: dict[str, Any], rows: Sequence[Row], directory: Path
) -> list[dict[str, Any]]:
    """The rows with those of an earlier run that they do not replace, in that run's order.

    Where kept rows are from goes into `machine`.
    """
    path = directory / f"{name}.json"
    if not path.exists():
        return [dict(row) for row in rows]
    earlier = json.loads(path.read_text(encoding="utf-8"))
    fresh = {_key(row): dict(row) for row in rows}
    kept = [row for row in earlier["rows"] if _key(row) not in fresh]
    if kept:
        source = earlier["machine"]
        machine["kept"] = {
            "rows": len(kept),
            "of": list(dict.fromkeys(row["scenario"] for row in kept)),
            "commit": source["commit"],
            "command": source["command"],
        }
    merged = [fresh.pop(_key(row), row) for row in earlier["rows"]]
    return [*merged, *fresh.values()]


def _key(row: Row) -> tuple[Any, ...]:
    """What was measured, without what came of it."""
    return tuple(value for name, value in row.items() if name not in _NUMBERS)


def write(name: str, machine: Mapping[str, Any], rows: Sequence[Row], directory: Path) -> None:
    """Write NAME.json and NAME.md into the directory."""
    document = {"benchmark": name, "machine": machine}
    head = json.dumps({**document, "rows": []}, indent=1, ensure_ascii=False)
    # One row a line: a result can be read, and compared with the next.
    body = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = head.replace('"rows": []', f'"rows": [\n  {body}\n ]')
    (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    packages = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    heading = (
        f"# {name}: {machine['date']}\n\n{machine['cpu']}, kernel {machine['kernel']}, Python "
        f"{machine['python']}, {packages}, commit {machine['commit']}.\n"
        f"Command: `{machine['command']}`: {machine['rollouts']:,} rollouts a row, "
        f"{machine['cpu_seconds']} s of one core.\n{_kept(machine)}\n"
    )
    (directory / f"{name}.md").write_text(heading + _TABLES[name](rows) + "\n", encoding="utf-8")


def _kept(machine: Mapping[str, Any]) -> str:
    if (kept := machine.get("kept")) is None:
        return ""
    return (
        f"{kept['rows']} rows ({', '.join(kept['of'])}) are of `{kept['command']}`, "
        f"commit {kept['commit']}.\n"
    )


def _false_rollbacks(rows: Sequence[Row]) -> str:
    def line(row: Row) -> list[str]:
        by = ", ".join(f"{name} {n}" for name, n in row["by_trigger"].items() if n)
        return [
            row["scenario"],
            f"{row['rate']:g}/s",
            f"{100 * row['base_error']:g} %",
            f"{row['false']} of {row['rollouts']:,}",
            f"{100 * row['upper']:.2f} %",
            by or "–",
        ]

    head = ["traffic", "rate", "errors", "taken back", "upper bound", "by trigger"]
    return table(head, map(line, rows))


def _bakes(rows: Sequence[Row]) -> str:
    def line(row: Row) -> list[str]:
        by = ", ".join(f"{name} {n}" for name, n in row["by_trigger"].items() if n)
        return [
            row["canary"],
            row["scenario"],
            f"{row['rate']:g}/s",
            f"{100 * row['base_error']:g} %",
            f"{row['ended']} of {row['rollouts']:,}",
            f"{100 * row['upper']:.2f} %",
            *_both(row["delay_s"]),
            by or "–",
        ]

    head = ["canary", "traffic", "rate", "errors", "taken back", "upper bound", "median s", "p95 s"]
    return table([*head, "by trigger"], map(line, rows))


def _detection(rows: Sequence[Row]) -> str:
    def line(row: Row) -> list[str]:
        return [
            row["fault"],
            f"{row['rate']:g}/s",
            str(row["replicas"]),
            _caught(row),
            *_both(row["delay_s"]),
            *_both(row["served"]),
            *_both(row["failed"]),
        ]

    head = ["fault", "rate", "replicas", "caught", "median s", "p95 s"]
    head += ["canary answers, median", "p95", "of them failed, median", "p95"]
    return table(head, map(line, rows))


def _peers(rows: Sequence[Row]) -> str:
    def line(row: Row) -> list[str]:
        regression = (
            row["kind"] if row["kind"] == "healthy" else f"{row['kind']} × {row['factor']:g}"
        )
        return [
            f"{100 * row['base_error']:g} %",
            regression,
            row["rule"],
            _caught(row),
            *_both(row["delay_s"]),
            *_both(row["failed"]),
        ]

    head = ["errors", "canary", "rule", "taken back", "median s", "p95 s"]
    return table([*head, "failed, median", "p95"], map(line, rows))


def _caught(row: Row) -> str:
    return f"{100 * row['caught']:.1f} %"


def _both(quantiles: Mapping[str, float | None]) -> list[str]:
    return ["–" if value is None else f"{value:,.0f}" for value in quantiles.values()]


_TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "false-rollbacks": _false_rollbacks,
    "bakes": _bakes,
    "detection": _detection,
    "peers": _peers,
}
