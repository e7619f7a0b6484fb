"""What a tick knows of a canary beside its counts: its costs over time, its GPUs, what broke.

Plain frozen data. `serving.core.rollout_costs` cuts the windows, `serving.core.cost_trigger` and
`serving.core.gpu_triggers` judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from serving.core.rollout_counts import ArmName

Uses = Mapping[str, tuple[int, int]]
"""By replica: nanoseconds of its device, and inferences that they answered."""


@dataclass(frozen=True, slots=True)
class CostMark:
    """What the arms had used of their devices by `at` (Unix seconds)."""

    at: float
    canary: Uses
    stable: Uses


@dataclass(frozen=True, slots=True)
class CostWindow:
    """(nano-USD, inferences) of the canary's replicas, and of all of stable's."""

    canary: Mapping[str, tuple[float, int]]
    stable: tuple[float, int]


@dataclass(frozen=True, slots=True)
class CostWindows:
    """Windows in which the arms were of equal size, oldest first, and where the open one began.

    A window has `width_s` seconds or more.
    """

    since: CostMark | None = None
    closed: tuple[CostWindow, ...] = ()
    width_s: float = 10.0


class IncidentKind(StrEnum):
    """What happened.

    Runs that did not fit into memory, an error that ended a process, an XID error of a program, or
    a fault of a GPU itself.
    """

    OOM = "oom"
    FATAL = "fatal"
    APPLICATION = "application"
    HARDWARE = "hardware"


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that happened to a replica or its GPU. `at` is Unix seconds.

    `count` is how many runs an OOM was. `alone`: nobody but this arm had replicas on the GPU.
    """

    at: float
    kind: IncidentKind
    arm: ArmName
    replica: str = ""
    gpu: str = ""
    what: str = ""
    count: int = 1
    alone: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Incident:
        """Read `to_dict`'s form, after JSON too."""
        return cls(**{**raw, "kind": IncidentKind(raw["kind"])})


@dataclass(frozen=True, slots=True)
class CanaryGpu:
    """A replica of the canary and its GPU now.

    `measured`: there is a fresh measurement. `ill` says what is wrong with the GPU itself, "" where
    nothing is. `free` is the least free share (0..1) of the GPU's memory and of the replica's
    lease, None where neither is known; `of` says of which.
    """

    replica: str
    gpu: str
    measured: bool = True
    ill: str = ""
    free: float | None = None
    of: str = ""
