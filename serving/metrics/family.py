"""What a metric family is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family. Durations are seconds, sizes bytes or rows, as the name says."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()


VERSION: Final = ("model", "version")
"""The labels of what is told by model version."""
