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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from serving.core.ledger_accounts import NOBODY, NS_PER_HOUR, Account, Amount, Kind
from serving.core.ledger_leases import WHOLE, Lease, Line, Source
from serving.core.ledger_lives import Life


class Device:
    """A GPU: what of its time nobody had a lease on, and the energy that it used.

    `rate` is its price in nano-dollars an hour, None if unknown. Of a GPU in MIG mode it is what
    its slices leave of the price: they are devices of their own.
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
        self._posted = Line()
        self._energy_mj: int | None = None
        self._used_mj: int | None = None

    def reprice(self, rate: int | None) -> None:
        """Another price, also of a GPU that was divided anew: its energy counts from here on."""
        self.rate, self._energy_mj = rate, None

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
        posted, self._posted = self._posted, Line(ns=free_ns, nano_usd=nano)
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
        device._posted = Line(*raw["posted"])
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
