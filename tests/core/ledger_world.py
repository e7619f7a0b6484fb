"""Replicas, gateways and a GPU with true times, and a ledger that hears of them as it happens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from serving.core.ledger import Device, settle
from serving.core.ledger_accounts import NS_PER_HOUR, Account, Amount, Kind
from serving.core.ledger_leases import WHOLE, Holder, Lease, ReplicaUsage

GPU = "GPU-1"
PRICES = {GPU: 6_880_000_001, "cpu": 42_500_000}


@dataclass
class TrueReplica:
    """A replica as it really is: totals in nanoseconds by its own clock."""

    holder: Holder
    began: int
    answered: int = 0
    padding: int = 0
    failed: int = 0
    warmup: int | None = None
    ended: int | None = None
    told: ReplicaUsage = field(default_factory=ReplicaUsage)

    def usage(self, now: int) -> ReplicaUsage:
        up = (now if self.ended is None else self.ended) - self.began
        warmup = up if self.warmup is None else self.warmup
        return ReplicaUsage(up, self.answered, self.padding, self.failed, warmup)


Rows = Counter[tuple[str, str]]


@dataclass
class TrueGateway:
    """A gateway process: by replica and (tenant, kind), nanoseconds and requests since then."""

    counter: str
    ns: dict[str, Rows] = field(default_factory=dict)
    requests: dict[str, Rows] = field(default_factory=dict)

    def report(self) -> dict[str, list[tuple[str, str, int, int]]]:
        return {
            replica: [(*key, ns, self.requests[replica][key]) for key, ns in rows.items()]
            for replica, rows in self.ns.items()
        }


class World:
    """`now` is true time. The controller's clock is off, runs at its own pace, and may be another.

    A controller that crashes forgets all since its last save; rows and state are saved together.
    """

    def __init__(self) -> None:
        self.now = 10**12
        self.offset, self.pace = 0, 1.0
        self.replicas: dict[str, TrueReplica] = {}
        self.gateways: dict[int, TrueGateway] = {}
        self.past_gateways: list[TrueGateway] = []
        self.leases: dict[str, Lease] = {}
        self.device = Device(GPU, self.clock())
        self.prices = dict(PRICES)
        self.rows: dict[Account, Amount] = {}
        # What each lease and the GPU have cost by price and time, as fractions of a nano-dollar
        # by NS_PER_HOUR.
        self.priced: Counter[str] = Counter()
        self.save()

    def clock(self) -> int:
        return self.offset + int(self.now * self.pace)

    # The controller.

    def hear_replica(self, name: str, usage: ReplicaUsage) -> None:
        replica = self.replicas[name]
        if name not in self.leases:
            self.leases[name] = Lease(replica.holder, self.clock())
            self._price()
        self.leases[name].announced(usage, self.clock())
        if usage.up_ns > replica.told.up_ns:
            replica.told = usage

    def hear_gateway(
        self, counter: str, report: dict[str, list[tuple[str, str, int, int]]]
    ) -> None:
        for replica, rows in report.items():
            if replica in self.leases:
                self.leases[replica].reported(counter, rows)

    def see_device(self) -> None:
        self.device.seen(self.now, None, self.clock())

    def settle(self) -> None:
        for lease in self.leases.values():
            if lease.life.silent(self.clock()):
                lease.life.close()
        lives = {name: lease.life.up_ns for name, lease in self.leases.items()}
        device_life = self.device.life.up_ns
        for account, amount, _ in settle(self.leases.values(), [self.device], self.clock()):
            self.rows.setdefault(account, Amount()).add(amount)
        for name, lease in self.leases.items():
            lived = lease.life.up_ns - lives[name]
            self.priced[name] += lived * (lease.rate or 0)
            if lease.holder.device == GPU:
                self.priced["leased"] += lived * lease.list_rate
        self.priced[GPU] += (self.device.life.up_ns - device_life) * (self.device.rate or 0)

    def _price(self) -> None:
        self.device.rate = self.prices[GPU]
        for lease in self.leases.values():
            share, price = lease.holder.share, self.prices[lease.holder.device]
            lease.rate = lease.list_rate = price * share // WHOLE

    def set_price(self, device: str, price: int) -> None:
        self.settle()
        self.prices[device] = price
        self._price()

    def save(self) -> None:
        leases = {name: lease.to_dict() for name, lease in self.leases.items()}
        state = {"leases": leases, "device": self.device.to_dict()}
        # As the store gives it back.
        self._saved = json.dumps(state)
        self._saved_rows = {k: Amount(v.nano_usd, v.ns, v.unpriced_ns, v.requests, v.energy_mj)
                            for k, v in self.rows.items()}  # fmt: skip
        self._saved_priced = Counter(self.priced)
        self._saved_told = {name: replica.told for name, replica in self.replicas.items()}

    def crash(self, offset: int) -> None:
        """Another controller takes up what was saved, on a clock of its own."""
        self.offset = offset
        state = json.loads(self._saved)
        self.leases = {n: Lease.from_dict(raw, self.clock()) for n, raw in state["leases"].items()}
        self.device = Device.from_dict(state["device"], self.clock())
        self.rows = {k: Amount(v.nano_usd, v.ns, v.unpriced_ns, v.requests, v.energy_mj)
                     for k, v in self._saved_rows.items()}  # fmt: skip
        self.priced = Counter(self._saved_priced)
        for name, replica in self.replicas.items():
            replica.told = self._saved_told.get(name, ReplicaUsage())
        self._price()

    # What is true.

    def start(self, device: str, share: int) -> str:
        name = f"replica-{len(self.replicas)}"
        holder = Holder("m", str(len(self.replicas)), device, share)
        self.replicas[name] = TrueReplica(holder, self.now)
        return name

    def gateway(self, number: int) -> TrueGateway:
        if number not in self.gateways:
            counter = f"g{number}-{len(self.past_gateways)}"
            self.gateways[number] = TrueGateway(counter)
        return self.gateways[number]

    def run(self, name: str, gateway: int, *, us: int, rows: int, run_rows: int, what: str) -> None:
        """A run of `us` microseconds from now; `what` is a source's kind, "error" or "lost"."""
        replica = self.replicas[name]
        self.now += us * 1000
        spent = us * 1000
        if what == "error":
            replica.failed += spent
            return
        charged = spent * rows // run_rows
        replica.answered += charged
        if run_rows > rows:
            replica.padding += spent * (run_rows - rows) // run_rows
        if what != "lost":
            tenant, _, kind = what.partition(" ")
            totals = self.gateway(gateway)
            totals.ns.setdefault(name, Counter())[tenant, kind] += charged
            totals.requests.setdefault(name, Counter())[tenant, kind] += 1

    # What the ledger says.

    def total(self, version: str | None = None, device: str | None = None) -> Amount:
        sum_ = Amount()
        for account, amount in self.rows.items():
            if version in (None, account.version) and device in (None, account.device):
                sum_.add(amount)
        return sum_

    def of(self, version: str) -> dict[tuple[str, str], int]:
        """Nanoseconds by (tenant, kind) of a replica's lease."""
        return {(a.tenant, a.kind.value): amount.ns for a, amount in self.rows.items()
                if a.version == version and amount.ns}  # fmt: skip

    def costs(self, name: str) -> int:
        """What a lease has cost in nano-dollars, by price and time."""
        return self.priced[name] // NS_PER_HOUR

    def unallocated(self) -> int:
        free = max(0, self.priced[GPU] - self.priced["leased"])
        return free // NS_PER_HOUR


__all__ = ["GPU", "Kind", "World"]
