"""What everything costs: leases by what replicas and gateways report, settled into the store.

Rows and the leases that they come from are written in one transaction, and everybody reports
totals: whatever is lost, here or on its way, is made good by the next report.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from serving.config import CostConfig
from serving.control.budgets import Spending, day_of
from serving.control.gpus import STALE_S, Standing
from serving.control.reconcile import Blocking, Clock
from serving.core.gpus import Gpu
from serving.core.ledger import Device, settle
from serving.core.ledger_accounts import Account, Amount, Kind
from serving.core.ledger_leases import WHOLE, Holder, Lease, ReplicaUsage
from serving.core.ledger_lives import Life
from serving.core.ledger_minutes import by_minute
from serving.core.prices import rate_of
from serving.errors import ConflictError, StoreError
from serving.store.ledger import LedgerRow
from serving.store.sql import Store

CPU: Final = "cpu"
FLUSH_S: Final = 5.0
"""What is not written yet is settled anew after a crash, so there is no hurry."""
KEEP_CLOSED_S: Final = 86_400.0
"""A replica that was only cut off may come back; after that it would be charged anew."""
MAX_SPREAD_S: Final = 3_600.0
"""What arose over a longer time counts in the last hour of it."""
_FOLD_S: Final = 3_600.0
_LEASE, _GPU = "lease ", "gpu "

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Charge:
    """What a GPU or slice costs by the price book: its rate, and its share of the whole GPU's."""

    rate: int | None
    memory_bytes: int | None


class CostLedger:
    """The ledger at work. Lives on the controller's loop.

    `override` gives the price of one replica of (model, version) where the configuration has one,
    in USD an hour. `labels` are the node labels by node.
    """

    def __init__(
        self,
        config: CostConfig,
        override: Callable[[str, str], float | None],
        gpus: Callable[[], Sequence[Standing]],
        *,
        store: Store,
        in_store: Blocking,
        clock: Clock,
    ) -> None:
        self._config = config
        self._book = config.price_book
        self._override, self._gpus = override, gpus
        self._store, self._in_store, self._clock = store, in_store, clock
        self.labels: Mapping[str, Mapping[str, str]] = {}
        self._leases: dict[str, Lease] = {}
        self._devices: dict[str, Device] = {}
        self._infos: dict[str, Mapping[str, Any]] = {}
        self._closed_at: dict[str, float] = {}
        self._pending: dict[tuple[int, Account], Amount] = {}
        self._written: dict[str, dict[str, Any]] = {}
        self._revision = 0
        self._flushed_at = self._folded_at = -FLUSH_S
        self._lock = asyncio.Lock()
        self.totals: dict[Account, Amount] = {}
        self.spending = Spending()

    async def load(self, *, fresh: bool = False) -> None:
        """Take up what was saved. If `fresh`, nothing of it runs any more. Raises `StoreError`."""
        self._revision, self._written = await self._in_store(self._store.ledger_cursors)
        self.totals = {account_of(row): amount_of(row) for row in await self.rows(None)}
        today = day_of(self._clock.unix())
        self.spending = Spending(today)
        for row in await self.rows(today):
            self.spending.add(today, account_of(row), row.nano_usd)
        now = self._now()
        # The time of a GPU goes on where the last controller left it.
        self._gpu_clock = int(self._clock.unix() * 1e9) - now
        self._leases = {
            name.removeprefix(_LEASE): Lease.from_dict(body, now)
            for name, body in self._written.items()
            if name.startswith(_LEASE)
        }
        self._devices = {
            name.removeprefix(_GPU): Device.from_dict(body, now)
            for name, body in self._written.items()
            if name.startswith(_GPU)
        }
        self._pending = {}
        self._closed_at = {}
        if fresh:
            for life in self._lives():
                life.close()

    # What replicas and gateways say.

    def announced(self, info: Mapping[str, Any]) -> None:
        """A replica's announcement; see `ReplicaUsage`."""
        usage = info.get("usage")
        if usage is None or not (info.get("device") or info.get("gpu")):
            # It has not come so far as to hold a device.
            return
        replica, now = str(info["replica"]), self._now()
        lease = self._leases.get(replica)
        if lease is None:
            lease = self._leases[replica] = Lease(self._holder(info), now)
        self._infos[replica] = info
        self._reprice(replica)
        lease.announced(ReplicaUsage.from_dict(usage), now)
        if info.get("ended"):
            lease.life.close()

    def reported(self, instance: str, usage: Iterable[Mapping[str, Any]]) -> None:
        """A gateway's totals by replica; see `UsageMeter`. A replica not known yet is told again.

        Raises `KeyError`, `TypeError` or `ValueError` if it is malformed.
        """
        for entry in usage:
            lease = self._leases.get(str(entry["replica"]))
            if lease is not None:
                rows = [(str(t), str(k), int(ns), int(n)) for t, k, ns, n in entry["rows"]]
                lease.reported(f"{instance}#{entry['began']}", rows)

    def price(self, replica: str) -> float | None:
        """What a replica costs, in USD an hour; None if its price is not known."""
        lease = self._leases.get(replica)
        return None if lease is None or lease.rate is None else lease.rate / 1e9

    @property
    def prices(self) -> dict[tuple[str, str, str], float | None]:
        """The prices of replicas that are there, by model, version and replica."""
        return {
            (lease.holder.model, lease.holder.version, replica): self.price(replica)
            for replica, lease in self._leases.items()
            if lease.life.open
        }

    def gpu_price(self, uuid: str) -> float | None:
        """What a GPU or slice costs by the price book, in USD an hour; None if it is not known."""
        rate = self._charge(uuid).rate
        return None if rate is None else rate / 1e9

    # Prices.

    def _holder(self, info: Mapping[str, Any]) -> Holder:
        model, version, uuid = str(info["model"]), str(info["version"]), info.get("gpu")
        if uuid is None:
            device = CPU if str(info["device"]).startswith(CPU) else str(info["device"])
            return Holder(model, version, device)
        held, total = info.get("lease_bytes"), self._charge(str(uuid)).memory_bytes
        share = min(WHOLE, WHOLE * int(held) // total) if held and total else WHOLE
        return Holder(model, version, str(uuid), share)

    def _reprice(self, replica: str) -> None:
        """Bring a lease's price up to date; what is due at the old one is settled first."""
        lease, info = self._leases[replica], self._infos[replica]
        device = lease.holder.device
        if device == CPU:
            price = self._book.core(self._labels(str(info["node"])))
            listed = None if price is None else rate_of(price.usd_per_hour * int(info["cores"]))
        else:
            whole = self._charge(device).rate
            listed = None if whole is None else whole * lease.holder.share // WHOLE
        own = self._override(lease.holder.model, lease.holder.version)
        rate = listed if own is None else rate_of(own)
        if (rate, listed or 0) != (lease.rate, lease.list_rate):
            if lease.life.told_ns:
                self._settle()
            lease.rate, lease.list_rate = rate, listed or 0

    def _own_rate(self, gpu: Gpu, standings: Sequence[Standing]) -> int | None:
        """The price of what is a device of its own here: of a divided GPU, what no slice has."""
        rate = self._charge(gpu.uuid).rate
        if rate is None:
            return None
        parts = (self._charge(s.gpu.uuid).rate for s in standings if s.gpu.mig_parent == gpu.uuid)
        return max(0, rate - sum(part or 0 for part in parts))

    def _charge(self, uuid: str) -> Charge:
        """The price of a GPU; that of a MIG slice is its share of its GPU's memory."""
        standings = {s.gpu.uuid: s for s in self._gpus()}
        found = standings.get(uuid)
        if found is None:
            return Charge(None, None)
        gpu = found.gpu
        whole = standings.get(gpu.mig_parent or "", found).gpu
        price = self._book.gpu(whole.name, self._labels(gpu.node))
        if price is None or gpu is whole:
            return Charge(None if price is None else price.rate, gpu.memory_bytes)
        if not gpu.memory_bytes or not whole.memory_bytes:
            return Charge(None, gpu.memory_bytes)
        return Charge(price.rate * gpu.memory_bytes // whole.memory_bytes, gpu.memory_bytes)

    def _labels(self, node: str) -> Mapping[str, str]:
        return self.labels.get(node, {})

    # Settling.

    async def flush(self, *, at_once: bool = False) -> None:
        """Settle, and write it if it is time to. Raises `StoreError` or `ConflictError`.

        What was not written is written by the next flush.
        """
        if not at_once and self._clock.monotonic() - self._flushed_at < FLUSH_S:
            return
        async with self._lock:
            self._flushed_at = self._clock.monotonic()
            for replica in self._infos.keys() & self._leases.keys():
                self._reprice(replica)
            self._look_at_devices()
            self._close_silent()
            self._settle()
            await self._write()
            if self._flushed_at - self._folded_at >= _FOLD_S:
                before = self._clock.unix() - self._config.retention_days * 86_400
                await self._in_store(self._store.fold_ledger, int(before // 60) * 60)
                self._folded_at = self._flushed_at

    def update_spending(self) -> None:
        """Bring `spending` up to what was reported; it is written with the next flush."""
        self._settle()

    async def conclude(self) -> None:
        """Write all for the last time: until now replicas are taken to be there."""
        for life in self._lives():
            life.conclude(self._now())
        await self.flush(at_once=True)

    def _look_at_devices(self) -> None:
        now, standings = self._now(), self._gpus()
        known = {s.gpu.uuid: s for s in standings}
        for standing in standings:
            gpu, sample = standing.gpu, standing.sample
            if sample is None or sample.lost or standing.age_s > STALE_S:
                continue
            device = self._devices.get(gpu.uuid)
            if device is None:
                device = self._devices[gpu.uuid] = Device(gpu.uuid, now)
            rate = self._own_rate(gpu, standings)
            if rate != device.rate:
                if device.life.told_ns:
                    self._settle()
                device.reprice(rate)
            device.seen(now + self._gpu_clock, _energy_mj(standing, known), now)

    def _close_silent(self) -> None:
        now, monotonic = self._now(), self._clock.monotonic()
        for life in self._lives():
            if life.silent(now):
                life.close()
        for replica, lease in self._leases.items():
            if lease.life.open:
                self._closed_at.pop(replica, None)
            else:
                self._closed_at.setdefault(replica, monotonic)

    def _lives(self) -> list[Life]:
        return [x.life for x in self._leases.values()] + [x.life for x in self._devices.values()]

    def _settle(self) -> None:
        """Add what has come to be since the last settlement to what is to be written."""
        unix = self._clock.unix()
        for account, amount, over_ns in settle(
            self._leases.values(), self._devices.values(), self._now()
        ):
            self.totals.setdefault(account, Amount()).add(amount)
            begin = unix - min(over_ns / 1e9, MAX_SPREAD_S)
            for minute, part in by_minute(amount, begin, unix):
                self._pending.setdefault((minute, account), Amount()).add(part)
                self.spending.add(minute, account, part.nano_usd)

    async def _write(self) -> None:
        old = [
            replica
            for replica, at in self._closed_at.items()
            if self._clock.monotonic() - at > KEEP_CLOSED_S
        ]
        # A GPU that is not seen any more begins anew if it comes back: nobody had it meanwhile.
        gone = [uuid for uuid, device in self._devices.items() if not device.life.open]
        state = {
            **{_LEASE + name: lease.to_dict() for name, lease in self._leases.items()},
            **{_GPU + name: device.to_dict() for name, device in self._devices.items()},
        }
        dropped = [*(_LEASE + name for name in old), *(_GPU + name for name in gone)]
        kept = {name: body for name, body in state.items() if name not in dropped}
        changed = {n: body for n, body in kept.items() if self._written.get(n) != body}
        # What is settled while this is written goes with the next.
        posted, self._pending = self._pending, {}
        rows = [row_of(m, account, amount) for (m, account), amount in posted.items()]
        if not (rows or changed or dropped):
            return
        try:
            await self._in_store(self._post, rows, changed, dropped, self._revision)
        except ConflictError:
            # Another controller has written meanwhile: what it wrote counts.
            await self.load()
            raise
        except StoreError:
            for key, amount in posted.items():
                self._pending.setdefault(key, Amount()).add(amount)
            raise
        self._revision += 1
        self._written = kept
        for name in old:
            del self._leases[name], self._closed_at[name]
            self._infos.pop(name, None)
        for name in gone:
            del self._devices[name]

    def _post(
        self,
        rows: Sequence[LedgerRow],
        cursors: Mapping[str, Mapping[str, Any]],
        dropped: Sequence[str],
        expected: int,
    ) -> None:
        self._store.post_ledger(rows, cursors, dropped, expected=expected)

    # What it says.

    async def rows(self, since: float | None) -> list[LedgerRow]:
        """Each account's sum since a Unix time, to the minute, or ever. Raises `StoreError`."""
        minute = None if since is None else int(since // 60) * 60
        return await self._in_store(self._store.ledger, minute)

    def _now(self) -> int:
        return int(self._clock.monotonic() * 1e9)


def _energy_mj(standing: Standing, known: Mapping[str, Standing]) -> int | None:
    """A count of a GPU's energy; of a slice its GPU's, by its share of the memory.

    Of a divided GPU it is what its slices leave.
    """
    gpu, whole = standing.gpu, known.get(standing.gpu.mig_parent or "", standing)
    if whole.sample is None or whole.sample.used_j is None:
        return None
    used_mj = whole.sample.used_j * 1000
    if whole is standing and not gpu.divided:
        return int(used_mj)
    if not gpu.memory_bytes or not whole.gpu.memory_bytes:
        return None
    parts = (s.gpu.memory_bytes or 0 for s in known.values() if s.gpu.mig_parent == gpu.uuid)
    return int(used_mj * max(0, gpu.memory_bytes - sum(parts)) / whole.gpu.memory_bytes)


def account_of(row: LedgerRow) -> Account:
    """The account of a row."""
    return Account(row.tenant, row.model, row.version, row.device, Kind(row.kind))


def amount_of(row: LedgerRow) -> Amount:
    """The amount of a row."""
    return Amount(row.nano_usd, row.ns, row.unpriced_ns, row.requests, row.energy_mj)


def row_of(minute: int, account: Account, amount: Amount) -> LedgerRow:
    """An amount as a row of the store."""
    return LedgerRow(minute, **asdict(account), **asdict(amount))
