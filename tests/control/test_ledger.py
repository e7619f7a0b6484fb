"""The ledger between replicas, gateways and a real store: nothing lost, nothing counted twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from serving.config import CostConfig
from serving.control.gpus import Standing
from serving.control.ledger import CostLedger
from serving.control.reconcile import Clock
from serving.core.gpus import Condition, Gpu, GpuSample
from serving.errors import ConflictError, StoreError
from serving.store.ledger import LedgerRow
from serving.store.sql import Store, open_store

SECOND = 10**9
MINUTE = 1_000_020
"""Unix time of the begin of a minute."""


async def at_once(call: Callable[..., Any], *args: Any) -> Any:
    return call(*args)


class World:
    """One store, and controllers that come and go."""

    def __init__(self, home: Path) -> None:
        self.store: Store = open_store(f"sqlite:///{home / 'store.db'}")
        self.now = 0.0
        self.offset = 0.0
        self.price: float | None = 3600.0
        self.gpus: list[Standing] = []
        self.config = CostConfig()

    def ledger(self, *, fresh: bool = False) -> CostLedger:
        """A new controller's, loaded."""
        ledger = CostLedger(
            self.config,
            lambda model, version: self.price,
            lambda: self.gpus,
            store=self.store,
            in_store=at_once,
            clock=Clock(lambda: self.offset + self.now, lambda: MINUTE + self.now),
        )
        asyncio.run(ledger.load(fresh=fresh))
        return ledger

    def announce(self, ledger: CostLedger, up_s: float, **more: Any) -> None:
        usage = dict.fromkeys(("answered_ns", "padding_ns", "failed_ns", "warmup_ns"), 0)
        usage |= {"up_ns": int(up_s * SECOND), **more.pop("usage", {})}
        info = {"replica": "r", "app": "a", "model": "m", "version": "1", "node": "n"}
        ledger.announced({**info, "device": "cpu", "cores": 2, "usage": usage, **more})

    def nano(self) -> dict[str, int]:
        return {row.kind: row.nano_usd for row in self.store.ledger()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def flush(ledger: CostLedger) -> None:
    asyncio.run(ledger.flush(at_once=True))


def gateway(ns: int, requests: int, began: int = 1) -> list[dict[str, Any]]:
    rows = [["default", "direct", ns, requests]]
    return [{"replica": "r", "began": began, "rows": rows}]


def test_a_controller_that_crashes_loses_nothing_and_counts_nothing_twice(world: World) -> None:
    first = world.ledger()
    world.announce(first, 10, usage={"answered_ns": 4 * SECOND})
    first.reported("g@1", gateway(4 * SECOND, 8))
    flush(first)
    assert world.nano() == {"direct": 4 * SECOND, "idle": 6 * SECOND}
    # What it hears now is lost with it.
    world.now = 3.0
    world.announce(first, 13, usage={"answered_ns": 5 * SECOND})
    world.offset = -777.0
    second = world.ledger()
    second.reported("g@1", gateway(5 * SECOND, 10))
    world.announce(second, 13, usage={"answered_ns": 5 * SECOND})
    flush(second)
    assert world.nano() == {"direct": 5 * SECOND, "idle": 8 * SECOND}
    assert {r.kind: r.requests for r in world.store.ledger()} == {"direct": 10, "idle": 0}
    assert {a.kind.value: x.nano_usd for a, x in second.totals.items()} == world.nano()


def test_a_write_that_fails_is_made_good(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = world.ledger()
    world.announce(ledger, 10)
    with monkeypatch.context() as broken:
        broken.setattr(world.store, "post_ledger", _fail)
        with pytest.raises(StoreError):
            flush(ledger)
    assert world.nano() == {}
    world.announce(ledger, 11)
    flush(ledger)
    assert world.nano() == {"idle": 11 * SECOND}


def _fail(*_: Any, **__: Any) -> None:
    raise StoreError("the disk is full")


def test_of_two_controllers_at_once_each_second_counts_once(world: World) -> None:
    old, new = world.ledger(), world.ledger()
    world.announce(old, 10)
    world.announce(new, 10)
    flush(new)
    with pytest.raises(ConflictError):
        flush(old)
    world.announce(old, 12)
    flush(old)
    assert world.nano() == {"idle": 12 * SECOND}


def test_a_new_price_holds_from_when_it_is_new(world: World) -> None:
    ledger = world.ledger()
    world.announce(ledger, 10)
    world.now, world.price = 5.0, 7200.0
    flush(ledger)
    assert world.nano() == {"idle": 15 * SECOND}
    assert ledger.price("r") == 7200.0
    world.announce(ledger, 16)
    flush(ledger)
    assert world.nano() == {"idle": 17 * SECOND}


def test_a_cpu_replica_has_the_price_of_its_cores(world: World) -> None:
    world.price = None
    ledger = world.ledger()
    world.announce(ledger, 3600)
    flush(ledger)
    assert world.nano() == {"idle": 2 * 42_500_000}
    assert ledger.price("r") == pytest.approx(0.085)


def test_what_has_no_price_is_unpriced(world: World) -> None:
    world.price = None
    ledger = world.ledger()
    world.announce(ledger, 5, device="cuda:0", gpu=None)
    flush(ledger)
    [row] = world.store.ledger()
    assert (row.device, row.nano_usd, row.ns, row.unpriced_ns) == (
        "cuda:0", 0, 5 * SECOND, 5 * SECOND
    )  # fmt: skip
    assert ledger.price("r") is None


def test_a_replica_that_says_farewell_is_charged_to_its_end(world: World) -> None:
    ledger = world.ledger()
    world.announce(ledger, 10)
    world.now = 3.0
    world.announce(ledger, 12.5, ended=True)
    world.now = 60.0
    flush(ledger)
    assert world.nano() == {"idle": 12_500_000_000}


def test_the_end_of_a_deployment(world: World) -> None:
    """Until the controller ends its replicas were there; the next deployment has others."""
    ledger = world.ledger()
    world.announce(ledger, 10)
    world.now = 1.5
    asyncio.run(ledger.conclude())
    world.now = 5000.0
    flush(world.ledger(fresh=True))
    assert world.nano() == {"idle": 11_500_000_000}


def test_a_gpu_and_its_lease(world: World) -> None:
    """An H100, a quarter of it leased."""
    world.price = None
    total = 80 << 30

    def look(energy_j: float) -> None:
        sample = GpuSample(at=0.0, energy_j=energy_j)
        gpu = Gpu("GPU-1", "n", 0, "NVIDIA H100 80GB HBM3", total)
        world.gpus = [Standing(gpu, "host", 0.0, sample, Condition(), None, (), ())]

    look(0.0)
    first = world.ledger()
    flush(first)
    for second in range(1, 11):
        world.now = float(second)
        look(100.0 * second)
        world.announce(first, second, gpu="GPU-1", device="cuda:0", lease_bytes=total // 4)
        flush(first)
    found = {row.kind: row for row in world.store.ledger()}
    per_second = 6_880_000_000 / 3600
    assert found["idle"].nano_usd == pytest.approx(10 * per_second / 4, abs=1)
    assert found["unallocated"].nano_usd == pytest.approx(10 * per_second * 3 / 4, abs=2)
    energy = {kind: row.energy_mj for kind, row in found.items()}
    assert sum(e or 0 for e in energy.values()) == 1_000_000
    assert energy["idle"] == pytest.approx(250_000, rel=0.2)
    assert first.price("r") == pytest.approx(6.88 / 4)
    assert first.gpu_price("GPU-1") == 6.88


def test_a_mig_slice_costs_its_share_of_the_memory(world: World) -> None:
    whole = Gpu("GPU-1", "n", 0, "NVIDIA A100-SXM4-40GB", 40 << 30, divided=True)
    part = Gpu("MIG-1", "n", 0, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 << 30, mig_parent="GPU-1")
    sample = GpuSample(at=0.0)
    world.gpus = [Standing(g, "h", 0.0, sample, Condition(), None, (), ()) for g in (whole, part)]
    assert world.ledger().gpu_price("MIG-1") == pytest.approx(2.75 / 8)


@pytest.mark.parametrize("divided_anew", [False, True])
def test_what_no_slice_has_of_a_gpu_is_unallocated(world: World, divided_anew: bool) -> None:
    whole = Gpu("GPU-1", "n", 0, "NVIDIA A100-SXM4-40GB", 40 << 30, divided=True)
    parts = [
        Gpu(f"MIG-{n}", "n", n, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 << 30, mig_parent="GPU-1")
        for n in (1, 2, 3)
    ]
    ledger = world.ledger()
    for second in range(9):
        world.now = float(second)
        # Divided anew, it has its third slice for the first four seconds only.
        seen = [whole, *(parts if second < 4 or not divided_anew else parts[:2])]
        sample = GpuSample(at=0.0, energy_j=1e6 + 400.0 * second)
        world.gpus = [Standing(g, "h", 0.0, sample, Condition(), None, (), ()) for g in seen]
        flush(ledger)
    found = {row.device: row for row in world.store.ledger()}
    per_slice = 2_750_000_000 / 3600 / 8
    # What it costs is what its parts cost, but that a slice is carried on while it may come back.
    lost = 5 if divided_anew else 0
    cost = sum(row.nano_usd for row in found.values())
    assert cost == pytest.approx(8 * 8 * per_slice, abs=lost * per_slice + 4)
    rest = found["GPU-1"]
    assert rest.nano_usd == pytest.approx(8 * 5 * per_slice, abs=lost * per_slice + 4)
    # Nothing of what its counter had before counts as used when its rest becomes another.
    assert 6 * 250_000 <= (rest.energy_mj or 0) <= 8 * 300_000


def test_minutes_and_what_is_older_than_is_kept(world: World) -> None:
    world.config = CostConfig(retention_days=1)
    ledger = world.ledger()
    world.announce(ledger, 1)
    flush(ledger)
    world.now = 90.0
    world.announce(ledger, 91)
    flush(ledger)
    rows = [(r.minute, r.nano_usd) for r in _minutes(world.store)]
    assert rows == [
        (MINUTE - 60, SECOND),
        (MINUTE, 60 * SECOND),
        (MINUTE + 60, 30 * SECOND),
    ]
    assert asyncio.run(ledger.rows(MINUTE + 61))[0].nano_usd == 30 * SECOND
    world.now = 2 * 86_400.0
    flush(ledger)
    assert _minutes(world.store)[0].minute == 0
    assert sum(r.nano_usd for r in _minutes(world.store)) >= 91 * SECOND


def _minutes(store: Store) -> Sequence[LedgerRow]:
    """Every minute's rows, oldest first."""
    minutes = sorted(
        {row.minute for row in store.ledger(since=1)} | {0, MINUTE - 60, MINUTE, MINUTE + 60}
    )
    found, later = [], sum(row.nano_usd for row in store.ledger())
    for minute, following in zip(minutes, [*minutes[1:], None], strict=True):
        rest = sum(r.nano_usd for r in store.ledger(since=following)) if following else 0
        if later != rest:
            found.append(LedgerRow(minute, "", "", "", "", "", later - rest, 0, 0, 0))
        later = rest
    return found


def test_the_energy_of_a_slice_is_its_share_of_its_gpus(world: World) -> None:
    whole = Gpu("GPU-1", "n", 0, "NVIDIA A100-SXM4-40GB", 40 << 30, divided=True)
    parts = [
        Gpu(f"MIG-{n}", "n", n, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 << 30, mig_parent="GPU-1")
        for n in (1, 2)
    ]
    ledger = world.ledger()
    for second in range(5):
        world.now = float(second)
        # It has no counter, so its agent adds up its power.
        sample = GpuSample(at=0.0, power_w=400.0, power_energy_j=400.0 * second)
        samples = [(whole, sample), *((part, GpuSample(at=0.0)) for part in parts)]
        world.gpus = [Standing(g, "h", 0.0, s, Condition(), None, (), ()) for g, s in samples]
        world.announce(ledger, second, gpu="MIG-1", device="cuda:0", lease_bytes=5 << 30)
        flush(ledger)
    used: Counter[str] = Counter()
    for row in world.store.ledger():
        used[row.device] += row.energy_mj or 0
    assert used == {"MIG-1": 200_000, "MIG-2": 200_000, "GPU-1": 1_200_000}


def test_an_agent_that_starts_anew_takes_no_energy_back(world: World) -> None:
    gpu, ledger = Gpu("GPU-1", "n", 0, "NVIDIA L4", 24 << 30), world.ledger()
    for second, joules in enumerate((0.0, 50.0, 100.0, 0.0, 50.0)):
        world.now = float(second)
        sample = GpuSample(at=0.0, power_energy_j=joules)
        world.gpus = [Standing(gpu, "h", 0.0, sample, Condition(), None, (), ())]
        flush(ledger)
    assert sum(row.energy_mj or 0 for row in world.store.ledger()) == 150_000
