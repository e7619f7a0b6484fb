"""What an hour of a GPU or of a CPU core costs, by rows that say what they match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from serving.core.cost import NANO

INSTANCE_LABELS: Final = ("node.kubernetes.io/instance-type", "instance-type")
"""The node labels that may say what kind of machine a node is."""


@dataclass(frozen=True, slots=True)
class Match:
    """What a price is for: GPUs by a pattern of their name, or CPU cores; on some nodes.

    Patterns are as in a shell, without regard to case. `labels` are node labels and their patterns.
    """

    gpu: str | None = None
    cpu: bool = False
    instance: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def fits(self, node: Mapping[str, str]) -> bool:
        """Whether a node with these labels is meant."""
        if self.instance is not None:
            kind = next((node[name] for name in INSTANCE_LABELS if name in node), "")
            if not _like(kind, self.instance):
                return False
        return all(_like(node.get(name, ""), value) for name, value in self.labels.items())

    @property
    def precision(self) -> int:
        """A node's label says more than its kind of machine, and that more than a GPU's name."""
        return 2 if self.labels else 1 if self.instance is not None else 0


@dataclass(frozen=True, slots=True)
class Price:
    """`usd_per_hour` of one GPU or core, where it is from and as of when."""

    match: Match
    usd_per_hour: float
    source: str
    as_of: str

    @property
    def rate(self) -> int:
        """The price in nano-dollars an hour."""
        return rate_of(self.usd_per_hour)


def rate_of(usd_per_hour: float) -> int:
    """A price in whole nano-dollars an hour."""
    return round(usd_per_hour * NANO)


class PriceBook:
    """Prices, the most precise that matches first; of equals the one that is written first."""

    def __init__(self, prices: Sequence[Price]) -> None:
        self.prices = sorted(prices, key=lambda price: -price.match.precision)

    def gpu(self, name: str, node: Mapping[str, str]) -> Price | None:
        """The price of a GPU by its name, on a node with these labels; None if there is none."""
        for price in self.prices:
            pattern = price.match.gpu
            if pattern is not None and _like(name, pattern) and price.match.fits(node):
                return price
        return None

    def core(self, node: Mapping[str, str]) -> Price | None:
        """The price of a CPU core on a node with these labels; None if there is none."""
        return next((p for p in self.prices if p.match.cpu and p.match.fits(node)), None)


def _like(value: str, pattern: str) -> bool:
    return bool(value) and fnmatchcase(value.lower(), pattern.lower())


def _aws(pattern: str, usd_per_hour: float) -> Price:
    return Price(
        Match(gpu=pattern),
        usd_per_hour,
        "AWS us-east-1, on demand, per GPU of the instance",
        "2026-11",
    )


DEFAULT_PRICES: Final = (
    _aws("*A10G*", 1.01),
    _aws("*L4", 0.80),
    _aws("*A100*40GB*", 2.75),
    _aws("*A100*80GB*", 3.43),
    _aws("*H100*", 6.88),
    _aws("*H200*", 7.91),
    Price(Match(cpu=True), 0.0425, "AWS us-east-1, on demand, c5, per vCPU", "2026-11"),
)
"""configs/prices.yaml, which a test compares with it."""
