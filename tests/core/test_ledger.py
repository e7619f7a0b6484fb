"""The ledger: whatever happens, and however it is heard of, the sum is price times time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.core.ledger import Device, settle
from serving.core.ledger_accounts import NS_PER_HOUR, Account, Amount, Kind
from serving.core.ledger_leases import GRACE_NS, WHOLE, Holder, Lease, ReplicaUsage
from serving.core.ledger_lives import SILENCE_NS
from serving.core.ledger_minutes import by_minute
from tests.core.ledger_world import GPU, PRICES, World

SECOND = 10**9

Step = tuple[Any, ...]

_SCHEDULES = st.builds(
    # Drawn step by step, Hypothesis' lists repeat themselves and seldom come to a run.
    lambda seed, size: schedule(random.Random(seed), size),
    st.integers(0, 2**32),
    st.integers(5, 120),
)
_OFTEN, _RARELY = 6, 1


def schedule(draw: random.Random, size: int) -> list[Step]:
    """What happens, in this order."""

    def delivery() -> str:
        return draw.choice(["now", "now", "late", "lost", "twice"])

    def run() -> Step:
        whose = ["default direct", "acme direct", "default failed", " shadow", "error", "lost"]
        us = draw.choice([draw.randint(1, 300), draw.randint(1, 3_000_000)])
        return (
            "run",
            draw.randint(0, 7),
            draw.randint(0, 2),
            us,
            draw.randint(1, 32),
            draw.choice(whose),
        )

    makers: list[tuple[int, Callable[[], Step]]] = [
        (_OFTEN, run),
        (_OFTEN, lambda: ("together", [run() for _ in range(draw.randint(2, 6))])),
        (_OFTEN, lambda: ("announce", draw.randint(0, 7), delivery())),
        (_OFTEN, lambda: ("report", draw.randint(0, 2), delivery())),
        (3, lambda: ("deliver",)),
        (3, lambda: ("wait", draw.choice([draw.randint(1, 999), draw.randint(1, 20 * SECOND)]))),
        (3, lambda: ("settle",)),
        (3, lambda: ("save",)),
        (_RARELY, lambda: ("see",)),
        (_RARELY, lambda: ("crash", draw.randint(-(10**15), 10**15))),
        (_RARELY, lambda: ("price", draw.choice([GPU, "cpu"]), draw.randint(0, 10**10))),
        (_RARELY, lambda: ("start", draw.choice([GPU, "cpu"]), WHOLE // 4)),
        (_RARELY, lambda: ("ready", draw.randint(0, 7))),
        (_RARELY, lambda: ("stop", draw.randint(0, 7))),
        (_RARELY, lambda: ("kill", draw.randint(0, 7))),
        (_RARELY, lambda: ("restart_gateway", draw.randint(0, 2))),
    ]
    weights = [weight for weight, _ in makers]
    return [make() for _, make in draw.choices(makers, weights, k=size)]


class Story:
    """Plays steps. Messages that are late wait in `post`, and come in any later order."""

    def __init__(self, pace: float) -> None:
        self.world = World()
        self.world.pace = pace
        self.post: list[tuple[Any, ...]] = []
        for device in (GPU, "cpu"):
            self._start(device, WHOLE // 3)
        for pick in (0, 1):
            self._wait(SECOND)
            self._ready(pick)
            self._announce(pick, "now")
        self._see()

    def play(self, step: Step) -> None:
        getattr(self, "_" + step[0])(*step[1:])

    def finish(self, *, last_words: bool) -> None:
        """Who is there says what is left to say; with `last_words` those that have left, too."""
        world = self.world
        for name, replica in world.replicas.items():
            if replica.ended is None or last_words:
                replica.ended = replica.ended or world.now
                world.hear_replica(name, replica.usage(world.now))
        for gateway in world.gateways.values():
            world.hear_gateway(gateway.counter, gateway.report())
        while self.post:
            self._deliver()
        world.see_device()
        for _ in range(5):
            # Corrections take their turn: what a source gives back, another takes.
            world.now += GRACE_NS
            world.settle()

    def _alive(self, pick: int) -> str | None:
        alive = [n for n, r in self.world.replicas.items() if r.ended is None]
        return alive[pick % len(alive)] if alive else None

    def _send(self, delivery: str, *message: Any) -> None:
        if delivery in ("now", "twice"):
            self._hear(*message)
        if delivery in ("late", "twice"):
            self.post.append(message)

    def _hear(self, kind: str, who: str, what: Any) -> None:
        hear = self.world.hear_replica if kind == "replica" else self.world.hear_gateway
        hear(who, what)

    def _deliver(self) -> None:
        if self.post:
            self._hear(*self.post.pop(len(self.post) // 2))

    def _start(self, device: str, share: int) -> None:
        used = sum(
            r.holder.share
            for r in self.world.replicas.values()
            if r.ended is None and r.holder.device == device
        )
        if device != GPU or used + share <= WHOLE:
            self.world.start(device, share if device == GPU else WHOLE)

    def _ready(self, pick: int) -> None:
        name = self._alive(pick)
        if name is not None and (replica := self.world.replicas[name]).warmup is None:
            replica.warmup = self.world.now - replica.began

    def _run(self, pick: int, gateway: int, us: int, rows: int, what: str) -> None:
        name = self._alive(pick)
        if name is not None and self.world.replicas[name].warmup is not None:
            run_rows = rows if us % 2 else 32
            self.world.run(name, gateway, us=us, rows=rows, run_rows=run_rows, what=what)

    def _together(self, runs: list[Step]) -> None:
        """Runs that overlap, on replicas that may share a GPU; one replica runs one at a time."""
        began, ended = self.world.now, dict[str | None, int]()
        for _, pick, *what in runs:
            name = self._alive(pick)
            self.world.now = ended.get(name, began)
            self._run(pick, *what)
            ended[name] = self.world.now
        self.world.now = max(ended.values())

    def _wait(self, ns: int) -> None:
        self.world.now += ns

    def _announce(self, pick: int, delivery: str) -> None:
        if (name := self._alive(pick)) is not None:
            usage = self.world.replicas[name].usage(self.world.now)
            self._send(delivery, "replica", name, usage)

    def _report(self, number: int, delivery: str) -> None:
        gateway = self.world.gateway(number)
        self._send(delivery, "gateway", gateway.counter, gateway.report())

    def _see(self) -> None:
        self.world.see_device()

    def _settle(self) -> None:
        self.world.settle()

    def _save(self) -> None:
        self.world.save()

    def _stop(self, pick: int) -> None:
        if (name := self._alive(pick)) is not None:
            replica = self.world.replicas[name]
            replica.ended = self.world.now
            self.world.hear_replica(name, replica.usage(self.world.now))

    def _kill(self, pick: int) -> None:
        if (name := self._alive(pick)) is not None:
            self.world.replicas[name].ended = self.world.now

    def _restart_gateway(self, number: int) -> None:
        self.world.past_gateways.append(self.world.gateway(number))
        del self.world.gateways[number]

    def _crash(self, offset: int) -> None:
        self.world.crash(offset)

    def _price(self, device: str, price: int) -> None:
        self.world.set_price(device, price)


@settings(max_examples=60, deadline=None)
@given(_SCHEDULES, st.sampled_from([0.9999, 1.0, 1.0001]))
def test_it_conserves(steps: list[Step], pace: float) -> None:
    """Σ over all kinds = Σ price × time, to the nano-dollar, at every settlement."""
    story = Story(pace)
    world = story.world
    for step in steps:
        story.play(step)
        world.settle()
        for name, replica in world.replicas.items():
            assert world.total(replica.holder.version).nano_usd == world.costs(name)
        assert world.total(version="").nano_usd == world.unallocated()
    story.finish(last_words=False)
    for name, replica in world.replicas.items():
        if name not in world.leases:
            continue
        spent = world.of(replica.holder.version)
        told = replica.told
        lived = sum(spent.values())
        # A replica that vanished is charged what it said last, and what gateways had after it.
        assert told.up_ns <= lived <= replica.usage(world.now).up_ns
        assert all(ns >= 0 for ns in spent.values())
        assert spent.get(("", "warmup"), 0) == told.warmup_ns
        assert spent.get(("", "padding"), 0) == told.padding_ns


@settings(max_examples=60, deadline=None)
@given(_SCHEDULES)
def test_everybody_pays_for_what_was_his(steps: list[Step]) -> None:
    """Where everyone could say his last word, each source has its true time, to the nanosecond."""
    story = Story(1.0)
    world = story.world
    for step in steps:
        if step[0] not in ("kill", "restart_gateway"):
            story.play(step)
    story.finish(last_words=True)
    for name, replica in world.replicas.items():
        expected = Counter({
            ("", "warmup"): replica.usage(world.now).warmup_ns,
            ("", "padding"): replica.padding,
        })  # fmt: skip
        reported = 0
        for gateway in world.gateways.values():
            expected.update(gateway.ns.get(name, {}))
            reported += sum(gateway.ns.get(name, {}).values())
        expected["", "failed"] += replica.failed + replica.answered - reported
        life = replica.usage(world.now).up_ns
        expected["", "idle"] = life - sum(expected.values())
        assert world.of(replica.holder.version) == {k: v for k, v in expected.items() if v}
        assert world.total(replica.holder.version).ns == life


def lease_of(rate: int | None, usage: ReplicaUsage) -> Lease:
    lease = Lease(Holder("m", "1", "cpu"), 0)
    lease.rate = rate
    lease.announced(usage, 0)
    lease.life.close()
    return lease


@given(st.integers(0, 10**11), st.integers(0, 10**13))
def test_a_lease_costs_its_price_times_its_life(rate: int, up_ns: int) -> None:
    _, amounts = lease_of(rate, ReplicaUsage(up_ns)).settle(0)
    assert sum(a.nano_usd for a in amounts.values()) == rate * up_ns // NS_PER_HOUR


@given(st.integers(0, 10**11), st.lists(st.integers(1, 10**10), min_size=1, max_size=20))
def test_any_cutting_of_time_comes_to_the_same(rate: int, cuts: list[int]) -> None:
    def cost(cut: list[int]) -> Counter[tuple[str, Kind]]:
        lease, up, spent = Lease(Holder("m", "1", "cpu"), 0), 0, Counter[tuple[str, Kind]]()
        lease.rate = rate
        for ns in cut:
            up += ns
            lease.announced(ReplicaUsage(up, answered_ns=up // 3, failed_ns=up // 7), up)
            lease.reported("g", [("default", "direct", up // 3, up)])
            _, amounts = lease.settle(up)
            spent.update({source: amount.nano_usd for source, amount in amounts.items()})
        return Counter({k: v for k, v in spent.items() if v})

    assert cost(cuts) == cost([sum(cuts)])


def test_an_unknown_price_is_time_and_never_zero_dollars() -> None:
    _, amounts = lease_of(None, ReplicaUsage(up_ns=5 * SECOND, warmup_ns=2 * SECOND)).settle(0)
    assert {s[1]: (a.nano_usd, a.unpriced_ns) for s, a in amounts.items()} == {
        Kind.WARMUP: (0, 2 * SECOND),
        Kind.IDLE: (0, 3 * SECOND),
    }


def test_a_late_report_is_moved_from_failed_to_its_tenant() -> None:
    lease = Lease(Holder("m", "1", "cpu"), 0)
    lease.rate = 3600 * 10**9
    spent: Counter[Kind] = Counter()

    def settle_at(seconds: int, up_s: int) -> Counter[Kind]:
        lease.announced(ReplicaUsage(up_s * SECOND, answered_ns=4 * SECOND), seconds * SECOND)
        _, amounts = lease.settle(seconds * SECOND)
        for (_, kind), amount in amounts.items():
            spent[kind] += amount.ns // SECOND
        return +spent

    assert settle_at(10, 10) == {Kind.IDLE: 10}
    grace = GRACE_NS // SECOND
    assert settle_at(10 + grace, 10 + grace) == {Kind.FAILED: 4, Kind.IDLE: 6 + grace}
    lease.reported("g", [("acme", "direct", 4 * SECOND, 9)])
    assert settle_at(11 + grace, 11 + grace) == {Kind.DIRECT: 4, Kind.IDLE: 7 + grace}


def test_one_that_vanishes_is_charged_what_it_said_last() -> None:
    lease = Lease(Holder("m", "1", "cpu"), 0)
    lease.announced(ReplicaUsage(5 * SECOND), 0)
    assert lease.settle(2 * SECOND)[0] == 7 * SECOND
    assert not lease.life.silent(SILENCE_NS - 1)
    assert lease.life.silent(SILENCE_NS)
    lease.life.close()
    assert lease.settle(60 * SECOND)[0] == -2 * SECOND
    # It was only cut off.
    lease.announced(ReplicaUsage(65 * SECOND), 60 * SECOND)
    assert lease.settle(60 * SECOND)[0] == 60 * SECOND


def test_a_message_that_was_long_on_its_way_stops_no_clock() -> None:
    """Or the ledger would be behind by the delay of the last announcement, whenever one looks."""
    lease = Lease(Holder("m", "1", "cpu"), 0)
    lived = 0
    for second, delay_ms in [(1, 0), (3, 90), (5, 10), (7, 90)]:
        heard_at = second * SECOND + delay_ms * 10**6
        lease.announced(ReplicaUsage(second * SECOND), heard_at)
        lived += lease.settle(heard_at)[0]
        assert heard_at - 10**7 <= lived <= heard_at
    # A clock that is slower is followed all the same.
    for second in range(9, 2000, 2):
        lease.announced(ReplicaUsage(int(second * SECOND * 0.9995)), second * SECOND)
        lived += lease.settle(second * SECOND)[0]
    assert lived == pytest.approx(1999 * SECOND * 0.9995, abs=SECOND // 20)


def test_a_gpu_is_charged_for_what_nobody_has_a_lease_on() -> None:
    device = Device(GPU, 0)
    device.rate = PRICES[GPU]
    device.seen(500 * SECOND, 1_000, 0)
    device.seen(3600 * SECOND + 500 * SECOND, 41_000, 3600 * SECOND)
    lease = Lease(Holder("m", "1", GPU, WHOLE // 4), 0)
    lease.rate = lease.list_rate = PRICES[GPU] // 4
    lease.announced(ReplicaUsage(3600 * SECOND, answered_ns=1800 * SECOND), 3600 * SECOND)
    lease.reported("g", [("default", "direct", 1800 * SECOND, 10)])
    found = {
        account.kind: amount for account, amount, _ in settle([lease], [device], 3600 * SECOND)
    }
    assert sum(a.nano_usd for a in found.values()) == PRICES[GPU]
    assert found[Kind.UNALLOCATED] == Amount(5_160_000_001, 2700 * SECOND, energy_mj=30_000)
    assert found[Kind.DIRECT] == Amount(860_000_000, 1800 * SECOND, 0, 10, 5_000)
    assert found[Kind.IDLE] == Amount(860_000_000, 1800 * SECOND, energy_mj=5_000)


def test_what_is_not_measured_is_absent() -> None:
    device = Device(GPU, 0)
    device.seen(SECOND, None, 0)
    device.seen(2 * SECOND, None, SECOND)
    [(account, amount, _)] = settle([], [device], SECOND)
    assert account == Account("", "", "", GPU, Kind.UNALLOCATED)
    assert amount == Amount(0, SECOND, SECOND, 0, None)


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 10**9),
    st.floats(0, 10**9),
    st.floats(0, 7200),
)
def test_minutes_add_up(nano: int, energy: int, begin: float, span: float) -> None:
    whole, parts = Amount(nano, nano * 2, 0, 3, energy), Amount()
    minutes = []
    for minute, part in by_minute(whole, begin, begin + span):
        minutes.append(minute)
        parts.add(part)
    assert parts == whole
    assert minutes == list(range(minutes[0], minutes[-1] + 1, 60))
    assert minutes[-1] <= begin + span < minutes[-1] + 60


def test_an_amount_is_spread_over_its_minutes() -> None:
    parts = dict(by_minute(Amount(nano_usd=900), 90.0, 180.0 + 60.0 * 0.0 + 30.0))
    assert {minute: part.nano_usd for minute, part in parts.items()} == {
        60: 225,
        120: 450,
        180: 225,
    }
