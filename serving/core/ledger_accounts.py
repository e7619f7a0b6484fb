"""Whom an amount of the ledger is charged to and what for, and what it is made of."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import StrEnum
from typing import Final

NS_PER_HOUR: Final = 3_600 * 10**9
_MJ_PER_KWH: Final = 3.6e9


class Kind(StrEnum):
    """What time was spent on."""

    DIRECT = "direct"
    PADDING = "padding"
    FAILED = "failed"
    SHADOW = "shadow"
    WARMUP = "warmup"
    IDLE = "idle"
    UNALLOCATED = "unallocated"


NOBODY: Final = ""
"""The tenant of what no tenant is charged for."""


@dataclass(frozen=True, slots=True, order=True)
class Account:
    """Who and what an amount is for. What is unallocated has neither model nor version."""

    tenant: str
    model: str
    version: str
    device: str
    kind: Kind


@dataclass(slots=True)
class Amount:
    """An amount on an account. `unpriced_ns` is the part of `ns` that has no price.

    `energy_mj` is in millijoules, None where it is not measured.
    """

    nano_usd: int = 0
    ns: int = 0
    unpriced_ns: int = 0
    requests: int = 0
    energy_mj: int | None = None

    def add(self, other: Amount) -> None:
        """Add another amount."""
        energies = [e for e in (self.energy_mj, other.energy_mj) if e is not None]
        self.nano_usd += other.nano_usd
        self.ns += other.ns
        self.unpriced_ns += other.unpriced_ns
        self.requests += other.requests
        self.energy_mj = sum(energies) if energies else None

    def __bool__(self) -> bool:
        return any(astuple(self))


def kwh(energy_mj: int) -> float:
    """Millijoules in kWh."""
    return energy_mj / _MJ_PER_KWH
