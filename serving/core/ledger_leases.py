"""What a replica's hold on its device came to, by what the time was for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any, Final

from serving.core.ledger_accounts import NOBODY, NS_PER_HOUR, Amount, Kind
from serving.core.ledger_lives import Life

GRACE_NS: Final = 30 * 10**9
WHOLE: Final = 10**6
"""Shares of a device are in millionths."""

Source = tuple[str, Kind]
"""(tenant, kind)"""

_IDLE: Final[Source] = (NOBODY, Kind.IDLE)
_WARMUP: Final[Source] = (NOBODY, Kind.WARMUP)
_PADDING: Final[Source] = (NOBODY, Kind.PADDING)
_FAILED: Final[Source] = (NOBODY, Kind.FAILED)


@dataclass(frozen=True, slots=True)
class ReplicaUsage:
    """What a replica says of itself: totals in nanoseconds since it began to load.

    `answered_ns` is the time of its runs as it told it to gateways, less `padding_ns`, the part of
    rows that were padding. `warmup_ns` is the time until it was ready; runs before that are in it
    and in no other.
    """

    up_ns: int = 0
    answered_ns: int = 0
    padding_ns: int = 0
    failed_ns: int = 0
    warmup_ns: int = 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ReplicaUsage:
        """Read an announcement's `usage`. Raises `KeyError` or `ValueError` if it is malformed."""
        return cls(*(int(raw[f.name]) for f in fields(cls)))


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose a lease is, and on what: `share` of `device`, in millionths."""

    model: str
    version: str
    device: str
    share: int = WHOLE


@dataclass(slots=True)
class Line:
    """What a source has come to: time, exact cost, and what of that is posted."""

    ns: int = 0
    units: int = 0
    nano_usd: int = 0
    requests: int = 0


class Lease:
    """One replica's hold on its device.

    `rate` is its price in nano-dollars an hour, None if unknown; `list_rate` what its share of the
    device is worth. Times `now` are the settler's monotonic clock in nanoseconds.
    """

    def __init__(self, holder: Holder, now: int) -> None:
        self.holder = holder
        self.rate: int | None = None
        self.list_rate = 0
        self.life = Life(heard_at=now)
        self._usage = ReplicaUsage()
        self._lines: dict[Source, Line] = {}
        # By gateway: its totals.
        self._reports: dict[str, dict[Source, tuple[int, int]]] = {}
        # What it had answered at times within the grace period, and before it.
        self._answered: deque[tuple[int, int]] = deque()
        self._ripe_ns = 0

    def announced(self, usage: ReplicaUsage, now: int) -> None:
        """Take what the replica says of itself."""
        if self.life.heard(usage.up_ns, now):
            self._usage = usage
            self._answered.append((now, usage.answered_ns))

    def reported(self, counter: str, rows: Iterable[tuple[str, str, int, int]]) -> None:
        """Take a gateway's totals: tenant, kind, ns, requests. `counter` began at 0."""
        totals = self._reports.setdefault(counter, {})
        for tenant, kind, ns, requests in rows:
            source = (tenant, Kind(kind))
            before = totals.get(source, (0, 0))
            totals[source] = (max(before[0], ns), max(before[1], requests))

    def settle(self, now: int) -> tuple[int, dict[Source, Amount]]:
        """Nanoseconds lived since the last settlement, and what they and corrections come to."""
        sums = self._sums()
        # What gateways had that the replica has not told of yet ran after it told.
        newer = max(0, sum(ns for ns, _ in sums.values()) - self._usage.answered_ns)
        life = self.life.at(now, least=self.life.told_ns + newer)
        split = self._split(self._wanted(sums, now), life)
        lived = sum(split.values()) - sum(line.ns for line in self._lines.values())
        amounts = {}
        for source, ns in split.items():
            line = self._lines.setdefault(source, Line())
            amount = amounts[source] = Amount(ns=ns - line.ns)
            if self.rate is None:
                amount.unpriced_ns = amount.ns
            else:
                line.units += amount.ns * self.rate
            line.ns = ns
            if source in sums:
                amount.requests = sums[source][1] - line.requests
                line.requests = sums[source][1]
        for source, nano in self._rounded().items():
            amounts[source].nano_usd = nano - self._lines[source].nano_usd
            self._lines[source].nano_usd = nano
        self.life.up_ns = sum(split.values())
        return lived, {source: amount for source, amount in amounts.items() if amount}

    def _sums(self) -> dict[Source, tuple[int, int]]:
        """(ns, requests) by source, over gateways."""
        sums: dict[Source, tuple[int, int]] = {}
        for totals in self._reports.values():
            for source, (ns, requests) in totals.items():
                before = sums.get(source, (0, 0))
                sums[source] = (before[0] + ns, before[1] + requests)
        return sums

    def _wanted(self, sums: Mapping[Source, tuple[int, int]], now: int) -> dict[Source, int]:
        """How long each source has had the device, by what is known now; all but idle."""
        while self._answered and now - self._answered[0][0] >= GRACE_NS:
            self._ripe_ns = self._answered.popleft()[1]
        lost = max(0, self._ripe_ns - sum(ns for ns, _ in sums.values()))
        usage = self._usage
        wanted = {
            _WARMUP: usage.warmup_ns,
            _PADDING: usage.padding_ns,
            _FAILED: usage.failed_ns + lost,
        }
        for source, (ns, _) in sorted(sums.items()):
            wanted[source] = wanted.get(source, 0) + ns
        return wanted

    def _split(self, wanted: Mapping[Source, int], life: int) -> dict[Source, int]:
        """A life of so long by source. A source grows as far as there is room for it."""
        split = {s: min(self._ns(s), ns) for s, ns in wanted.items()}
        room = max(0, life - sum(split.values()))
        for source, ns in wanted.items():
            more = min(ns - split[source], room)
            split[source] += more
            room -= more
        split[_IDLE] = room
        return split

    def _ns(self, source: Source) -> int:
        line = self._lines.get(source)
        return 0 if line is None else line.ns

    def _rounded(self) -> dict[Source, int]:
        """The cost of each source so far in nano-dollars; idle takes what the others' lose."""
        nano = {s: line.units // NS_PER_HOUR for s, line in self._lines.items() if s != _IDLE}
        total = sum(line.units for line in self._lines.values()) // NS_PER_HOUR
        nano[_IDLE] = total - sum(nano.values())
        return nano

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the store."""
        return {
            "holder": list(astuple(self.holder)),
            "rate": self.rate,
            "list_rate": self.list_rate,
            "up_ns": self.life.up_ns,
            "told_ns": self.life.told_ns,
            "open": self.life.open,
            "usage": list(astuple(self._usage)),
            "ripe_ns": self._ripe_ns,
            "lines": [[*source, *astuple(line)] for source, line in self._lines.items()],
            "reports": {
                counter: [[*source, *totals] for source, totals in report.items()]
                for counter, report in self._reports.items()
            },
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], now: int) -> Lease:
        """Read `to_dict`'s form."""
        lease = cls(Holder(*raw["holder"]), now)
        lease.rate, lease.list_rate = raw["rate"], int(raw["list_rate"])
        lease._usage = ReplicaUsage(*raw["usage"])
        lease.life = Life(raw["up_ns"], heard_at=now, told_ns=raw["told_ns"])
        lease.life.open = bool(raw["open"])
        lease._ripe_ns = int(raw["ripe_ns"])
        lease._answered.append((now, lease._usage.answered_ns))
        for tenant, kind, *numbers in raw["lines"]:
            lease._lines[tenant, Kind(kind)] = Line(*numbers)
        for counter, rows in raw["reports"].items():
            lease.reported(counter, rows)
        return lease
