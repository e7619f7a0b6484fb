"""What the time of every device cost, and what it was for.

A replica holds a *lease* on a device, a GPU or CPU cores, from the moment it begins to load until
it exits. All of that time is charged, to the nano-dollar, to one of these kinds:

    direct    runs whose answers went to clients, by tenant
    padding   the rows that filled a run up to its bucket
    failed    runs that failed, and answers that nobody got
    shadow    copies of requests that a rollout made
    warmup    from the lease's begin until the replica was ready
    idle      the rest of a lease
    unallocated  the part of a GPU's time on which nobody had a lease

So their sum is the price times the time, whatever happened. Three rules make it hold:

*Time.* Everybody reports how long something took by their own clock, as totals since their start:
a replica its life and its runs, a gateway the time of the runs that it got answers from. A report
that is lost, late or sent twice changes nothing in the end, and a clock that is wrong changes
nothing at all. A lease's life is its replica's own count, carried on for as long as it is heard of;
of one that vanishes, what it said last, and the runs that gateways had of it after that. Sources
take no more than there is of a life.
What a replica ran and no gateway has accounted for is idle until `GRACE_NS` have passed, then
failed: its answer reached nobody. If the report comes later still, it is moved to where it belongs:
an amount can be negative where it corrects an earlier one.

*Money.* A price is a whole number of nano-dollars an hour. Time times price is kept exactly, as an
integer in units of a nano-dollar by 1/3.6e12; a price that changes holds from the settlement at
which it is new.

*Rounding.* The total of a lease is rounded down to the nano-dollar, and so is each of its sources;
idle is the lease's total less its other sources, so that what is cut off is in there. What is
unallocated of a device is rounded down, too. Each is the difference to what was posted before, so
it does not matter how time is cut into settlements.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from typing import Any, Final

NS_PER_HOUR: Final = 3_600 * 10**9
GRACE_NS: Final = 30 * 10**9
SILENCE_NS: Final = 8 * 10**9
"""Four missed announcements: so long a life is carried on that nobody has heard of."""
_MJ_PER_KWH: Final = 3.6e9
_MAX_LATE_NS: Final = 10**9
# Clocks are taken to differ by one part in so many at most.
_MAX_DRIFT: Final = 1000
WHOLE: Final = 10**6
"""Shares of a device are in millionths."""


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

Source = tuple[str, Kind]
"""(tenant, kind)"""

_IDLE: Final[Source] = (NOBODY, Kind.IDLE)
_WARMUP: Final[Source] = (NOBODY, Kind.WARMUP)
_PADDING: Final[Source] = (NOBODY, Kind.PADDING)
_FAILED: Final[Source] = (NOBODY, Kind.FAILED)


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


class Life:
    """How long something has been there, from what it says and when that was heard (monotonic).

    A message that was long on its way says less than is true by then. So the clock goes on as the
    fastest messages have set it, less a little, by which it follows one that runs slower.
    """

    def __init__(self, up_ns: int = 0, *, heard_at: int = 0, told_ns: int = 0) -> None:
        self.up_ns = up_ns
        self.open = True
        self._told_ns, self._heard_at = told_ns, heard_at
        self._late_ns = 0

    @property
    def told_ns(self) -> int:
        """What it said last."""
        return self._told_ns

    def heard(self, told_ns: int, now: int) -> bool:
        """Take what it says; whether that is news, and not a message that came late or twice."""
        if told_ns <= self._told_ns:
            return False
        if self._told_ns and self.open:
            since = now - self._heard_at
            expected = self._told_ns + self._late_ns + since - since // _MAX_DRIFT
            self._late_ns = max(0, min(expected - told_ns, _MAX_LATE_NS))
        self._told_ns, self._heard_at, self.open = told_ns, now, True
        return True

    def silent(self, now: int) -> bool:
        """Whether it has not been heard of for `SILENCE_NS`."""
        return now - self._heard_at >= SILENCE_NS

    def close(self) -> None:
        """It is gone: what it said last was its life."""
        self.open = False
        self._late_ns = 0

    def conclude(self, now: int) -> None:
        """Nobody will hear more of it: what it is thought to be is what it was."""
        if self.open:
            self._told_ns, self._heard_at = max(self._told_ns, self.at(now)), now

    def at(self, now: int, least: int = 0) -> int:
        """How long it has been there by `now`, `least` or more: never less than before if open."""
        if not self.open:
            return max(self._told_ns, least)
        since = max(0, min(now - self._heard_at, SILENCE_NS)) + self._late_ns
        return max(self.up_ns, self._told_ns + since, least)


@dataclass(slots=True)
class _Line:
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
        self._lines: dict[Source, _Line] = {}
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
            line = self._lines.setdefault(source, _Line())
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
            lease._lines[tenant, Kind(kind)] = _Line(*numbers)
        for counter, rows in raw["reports"].items():
            lease.reported(counter, rows)
        return lease


class Device:
    """A GPU: what of its time nobody had a lease on, and the energy that it used.

    `rate` is its price in nano-dollars an hour, None if unknown.
    """

    def __init__(self, uuid: str, now: int) -> None:
        self.uuid = uuid
        self.rate: int | None = None
        self.life = Life(heard_at=now)
        self._first_ns: int | None = None
        # What its time was worth and how long it was, and what of either was leased. Exact, times
        # in millionths of a nanosecond.
        self._units = self._leased_units = 0
        self._time = self._leased_time = 0
        self._posted = _Line()
        self._energy_mj: int | None = None
        self._used_mj: int | None = None

    def seen(self, up_ns: int, energy_mj: int | None, now: int) -> None:
        """Take its node's uptime and its energy counter; both only grow.

        Before it was first seen it cost nobody anything.
        """
        if self._first_ns is None:
            self._first_ns = self.life.up_ns = up_ns
        if self.life.heard(up_ns, now) and energy_mj is not None:
            if self._energy_mj is not None:
                self._used_mj = (self._used_mj or 0) + max(0, energy_mj - self._energy_mj)
            self._energy_mj = energy_mj

    def settle(self, now: int, held: Iterable[Settled]) -> Amount:
        """What is unallocated since the last settlement. `held` are its leases' settlements."""
        before, self.life.up_ns = self.life.up_ns, self.life.at(now)
        lived = self.life.up_ns - before
        self._time += lived * WHOLE
        self._units += lived * (self.rate or 0)
        for settled in held:
            self._leased_time += settled.lived_ns * settled.lease.holder.share
            self._leased_units += settled.lived_ns * settled.lease.list_rate
        free_ns = max(0, self._time - self._leased_time) // WHOLE
        nano = max(0, self._units - self._leased_units) // NS_PER_HOUR
        posted, self._posted = self._posted, _Line(ns=free_ns, nano_usd=nano)
        amount = Amount(nano - posted.nano_usd, free_ns - posted.ns)
        if self.rate is None:
            amount.unpriced_ns = amount.ns
        self._share_energy([*held], amount)
        return amount

    def _share_energy(self, held: Iterable[Settled], free: Amount) -> None:
        """Divide the energy used by share of the device's time; what is cut off is unallocated."""
        if self._used_mj is None:
            return
        shares = [
            (amount, max(0, amount.ns) * settled.lease.holder.share)
            for settled in held
            for amount in settled.amounts.values()
        ]
        total = sum(share for _, share in shares) + max(0, free.ns) * WHOLE
        if not total:
            return
        used, self._used_mj = self._used_mj, None
        free.energy_mj = used
        for amount, share in shares:
            amount.energy_mj = used * share // total
            free.energy_mj -= amount.energy_mj

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the store."""
        return {
            "uuid": self.uuid,
            "rate": self.rate,
            "up_ns": self.life.up_ns,
            "told_ns": self.life.told_ns,
            "open": self.life.open,
            "first_ns": self._first_ns,
            "units": [self._units, self._leased_units],
            "time": [self._time, self._leased_time],
            "posted": list(astuple(self._posted)),
            "energy_mj": [self._energy_mj, self._used_mj],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], now: int) -> Device:
        """Read `to_dict`'s form."""
        device = cls(raw["uuid"], now)
        device.rate, device._first_ns = raw["rate"], raw["first_ns"]
        device.life = Life(raw["up_ns"], heard_at=now, told_ns=raw["told_ns"])
        device.life.open = bool(raw["open"])
        device._units, device._leased_units = raw["units"]
        device._time, device._leased_time = raw["time"]
        device._posted = _Line(*raw["posted"])
        device._energy_mj, device._used_mj = raw["energy_mj"]
        return device


@dataclass(frozen=True, slots=True)
class Settled:
    """What a lease's settlement came to: the nanoseconds that it lived, and its amounts."""

    lease: Lease
    lived_ns: int
    amounts: Mapping[Source, Amount]


def settle(
    leases: Iterable[Lease], devices: Iterable[Device], now: int
) -> Iterator[tuple[Account, Amount, int]]:
    """Every amount since the last settlement, and over how many nanoseconds up to `now` it arose.

    `now` is monotonic, in nanoseconds.
    """
    by_device: dict[str, list[Settled]] = {}
    for lease in leases:
        settled = Settled(lease, *lease.settle(now))
        by_device.setdefault(lease.holder.device, []).append(settled)
    for device in devices:
        held = by_device.get(device.uuid, [])
        before = device.life.up_ns
        if amount := device.settle(now, held):
            account = Account(NOBODY, "", "", device.uuid, Kind.UNALLOCATED)
            yield account, amount, device.life.up_ns - before
    for held in by_device.values():
        for settled in held:
            holder = settled.lease.holder
            for (tenant, kind), amount in settled.amounts.items():
                account = Account(tenant, holder.model, holder.version, holder.device, kind)
                yield account, amount, max(0, settled.lived_ns)
