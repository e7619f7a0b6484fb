"""One model's result while it is measured: on disk after each figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks import results
from benchmarks.results import Target

PREFIX: Final = "gpu-"
"""Of a benchmark's name; the model's follows."""
Curve = Mapping[int, Mapping[str, float]]


class Record:
    """Rounds {"bare": {rows: …}, "gateway": {connections: …}, "ratio"} and the one under way.

    `facts` are what the document says beside them. `path` is the JSON file's, which is there from
    the first figure on; `log` is where a failure's log belongs.
    """

    def __init__(self, model: str, facts: Mapping[str, Any], out: Path) -> None:
        self.path = results.path(f"{PREFIX}{model}", out)
        self.log = self.path.with_suffix(".log")
        self.failure: str | None = None
        self._name = f"{PREFIX}{model}"
        self._facts = facts
        self._rounds: list[dict[str, Any]] = []
        self._unfinished: dict[str, Any] = {}

    @property
    def measured(self) -> bool:
        """Whether there is any figure."""
        return bool(self._rounds or self._unfinished)

    def bare(self, curve: Curve) -> None:
        """The bare loop's figures begin a round."""
        self._unfinished = {"bare": curve, "gateway": {}}
        self._save()

    def served(self, connections: int, figures: Mapping[str, float]) -> None:
        """The gateway's at one number of connections."""
        self._unfinished["gateway"][connections] = figures
        self._save()

    def end_round(self) -> tuple[float, float]:
        """The best rows per second in it, of the bare loop and of the gateway."""
        bare, served = _best(self._unfinished["bare"]), _best(self._unfinished["gateway"])
        self._rounds.append({**self._unfinished, "ratio": served / bare})
        self._unfinished = {}
        self._save()
        return bare, served

    def fail(self, reason: str) -> None:
        """Nothing more is measured. Where nothing was, an earlier result in its place stays."""
        self.failure = reason
        if self.measured:
            self._save()

    def _save(self) -> None:
        body: dict[str, Any] = {**self._facts, "failure": self.failure}
        body["summary"] = results.median_of(self._rounds or [self._unfinished])
        body["rounds"], body["unfinished_round"] = self._rounds, self._unfinished
        body["targets"] = results.targets_json(self._targets())
        described = body.pop("machine")
        results.save(self.path, results.document(self._name, described, body))

    def _targets(self) -> list[Target]:
        if not self._rounds:
            return []
        ratio = statistics.median(each["ratio"] for each in self._rounds)
        return [Target("rows per second, against the bare loop's best", ratio, 0.9, True, "×")]


def _best(curve: Curve) -> float:
    return max(each["rows_per_s"] for each in curve.values())
