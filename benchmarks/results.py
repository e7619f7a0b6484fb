"""Medians over rounds, targets beside figures, and the result files."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Target:
    """A number to reach. `at_least` says on which side of `bound` the figure must be."""

    name: str
    figure: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure reaches the bound."""
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def row(self) -> list[str]:
        """The target as a table row."""
        sign = "≥" if self.at_least else "≤"
        figure, bound = (
            f"{number(self.figure)} {self.unit}",
            f"{sign} {number(self.bound)} {self.unit}",
        )
        return [self.name, figure.strip(), bound.strip(), "met" if self.met else "MISSED"]


def median_of(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of every numeric figure over rounds; nested mappings are merged likewise.

    Rounds need not have the same keys (a process may be absent from one): missing counts as 0.
    """
    merged: dict[str, Any] = {}
    for key in sorted({key for each in rounds for key in each}):
        present = [each[key] for each in rounds if key in each]
        if isinstance(present[0], Mapping):
            merged[key] = median_of([each.get(key, {}) for each in rounds])
        else:
            merged[key] = statistics.median([*present, *[0] * (len(rounds) - len(present))])
    return merged


def number(value: float) -> str:
    """Three significant digits at least, no more decimals than that, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it reads well as plain text too."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def targets_table(targets: Sequence[Target]) -> str:
    """Targets beside what was measured."""
    return table(["target", "measured", "asked", ""], (target.row() for target in targets))


def path(name: str, directory: Path) -> Path:
    """Where the result of benchmark `name` lies in `directory`: `<date>-<cpu>-<name>.json`."""
    return directory / f"{_today()}-{machine.cpu_slug()}-{name}.json"


def document(name: str, described: Mapping[str, object], body: Mapping[str, Any]) -> dict[str, Any]:
    """A result as JSON holds it; `described` is what `machine.describe` gave."""
    return {"benchmark": name, "date": _today(), "machine": described, **body}


def targets_json(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Targets as a result's JSON holds them."""
    return [{**asdict(target), "met": target.met} for target in targets]


def save(file: Path, found: Mapping[str, Any]) -> None:
    """Write a result as JSON: whoever is killed meanwhile leaves what was there before, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".json.new")
    text = json.dumps(found, indent=1, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(file)


def markdown(found: Mapping[str, Any], text: str) -> str:
    """`text` below a heading that says what the result was measured on."""
    on = found["machine"]
    return (
        f"# {found['benchmark']}: {found['date']}\n\n{on['cpu']}, {on['cores']} cores, kernel "
        f"{on['kernel']}, Python {on['python']}, {on['wrk']}, commit {on['commit']}.\n"
        f"Command: `{on['command']}`.\n\n{text}\n"
    )


def write(name: str, body: Mapping[str, Any], targets: Sequence[Target], text: str) -> Path:
    """Write a result into `RESULTS` as JSON and as Markdown; returns the JSON file's path."""
    body = {**body, "targets": targets_json(targets)}
    found, file = document(name, machine.describe(), body), path(name, RESULTS)
    save(file, found)
    file.with_suffix(".md").write_text(markdown(found, text), encoding="utf-8")
    return file


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
