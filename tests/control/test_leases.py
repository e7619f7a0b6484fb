"""The book of leases: what is granted, renewed, given back, and refused."""

from __future__ import annotations

from collections import Counter

import pytest

from serving.control.leases import EXPIRY_S, Applicant, Lease, LeaseBook
from serving.core.placement import Demand, Device
from serving.core.replica import GpuLease
from serving.errors import DeviceError, Unavailable

GIB = 1 << 30


def gpu(name: str, gib: float = 24, node: str = "n1", **facts) -> Device:
    return Device(f"GPU-{name}", node, "L4", int(gib * GIB), **facts)


def demand(app: str, gib: float, replicas: int = 1, **facts) -> Demand:
    return Demand(app, app, "1", replicas, int(gib * GIB), **facts)


def leased(book: LeaseBook) -> dict[str, int]:
    """Bytes a GPU."""
    total: Counter[str] = Counter()
    for lease in book.leases:
        total[lease.terms.uuid] += lease.terms.bytes
    return total


class Desk:
    """A book with its devices and demands."""

    def __init__(self, devices, *waves) -> None:
        self.book, self.devices, self.waves, self.now = LeaseBook(), devices, waves, 0.0

    def ask(
        self, app: str, number: int = 0, node: str = "n1", estimated: bool = False, later=()
    ) -> Lease:
        who = Applicant(app, f"{app}#{number}", node, 100 + number, f"lease {app} {number}")
        return self.book.lease(
            who, self.devices, self.waves, estimated=estimated, now=self.now, unix=self.now,
            ceiling=lambda kind, _: {"L4": 16}.get(kind), later=later,
        )  # fmt: skip


def test_a_lease_is_what_was_planned():
    desk = Desk([gpu("a"), gpu("b")], [demand("x", 10, 2)])
    plan = desk.book.plan(desk.devices, desk.waves)
    granted = [desk.ask("x", i).terms.uuid for i in range(2)]
    assert sorted(granted) == sorted(plan.slots["x"]) == ["GPU-a", "GPU-b"]
    assert desk.ask("x", 0).terms == GpuLease("lease x 0", granted[0], 10 * GIB, 24 * GIB, 16)


def test_to_ask_again_is_to_renew():
    desk = Desk([gpu("a")], [demand("x", 10)])
    first = desk.ask("x")
    desk.now = EXPIRY_S
    assert desk.ask("x").terms == first.terms
    desk.now = 2 * EXPIRY_S
    assert desk.book.expire(desk.now) == []
    assert [x.replica for x in desk.book.leases] == ["x#0"]


def test_who_vanished_frees_its_share():
    desk = Desk([gpu("a", 12)], [demand("x", 10)])
    desk.ask("x")
    with pytest.raises(DeviceError, match=r"needs 10.0 GiB; the largest free is 2.0 GiB on GPU-a"):
        desk.ask("x", 1)
    desk.now = EXPIRY_S + 1
    assert [x.replica for x in desk.book.expire(desk.now)] == ["x#0"]
    assert desk.ask("x", 1).terms.uuid == "GPU-a"


def test_who_is_on_its_way_out_keeps_its_room_and_counts_for_none():
    desk = Desk([gpu("a", 12), gpu("b", 12)], [demand("x", 10)])
    first = desk.ask("x").terms.uuid
    desk.book.departing = lambda: {"x#0"}
    second = desk.ask("x", 1).terms.uuid
    assert {first, second} == {"GPU-a", "GPU-b"}
    desk.waves = ([demand("x", 10, 2)],)
    with pytest.raises(Unavailable, match=r"largest free is 2.0 GiB on GPU-a; it waits for what"):
        desk.ask("x", 2)
    desk.book.release("x#0")
    assert desk.ask("x", 2).terms.uuid == first


def test_who_gave_its_share_back_is_waited_for_no_longer_than_its_lease_would_have_lasted():
    desk = Desk([gpu("a", 12)], [demand("x", 10)])
    desk.ask("x")
    desk.book.release("x#0")
    assert [x.replica for x in desk.book.released] == ["x#0"]
    desk.devices, later = [gpu("a", 12, used_by_others=10 * GIB)], desk.devices
    with pytest.raises(Unavailable, match="it waits for what is to go"):
        desk.ask("x", 1, later=later)
    desk.book.expire(EXPIRY_S + 1)
    assert desk.book.released == []
    with pytest.raises(DeviceError, match=r"the largest free is 2.0 GiB on GPU-a$"):
        desk.ask("x", 1)


def test_who_is_done_frees_its_share_at_once():
    desk = Desk([gpu("a", 12)], [demand("x", 10)])
    desk.ask("x")
    desk.book.release("x#0")
    assert desk.ask("x", 1).replica == "x#1"


def test_a_replacement_gets_more_while_there_is_room():
    """Before the replica that it replaces is known to be gone."""
    desk = Desk([gpu("a"), gpu("b")], [demand("x", 10)])
    assert [desk.ask("x", i).terms.uuid for i in range(2)] == ["GPU-a", "GPU-b"]


def test_the_room_of_a_lost_replica_waits_for_its_replacement():
    """A smaller application that is only to start does not take it."""
    desk = Desk([gpu("a", 12)], [demand("running", 10)], [demand("starting", 8)])
    desk.ask("running")
    desk.book.release("running#0")
    with pytest.raises(DeviceError, match=r"model 'starting' version 1 on node n1: needs 8.0 GiB"):
        desk.ask("starting")
    assert desk.ask("running", 1).terms.uuid == "GPU-a"


def test_a_lease_is_of_the_replicas_own_node():
    desk = Desk([gpu("a"), gpu("b", node="n2")], [demand("x", 10)])
    assert desk.ask("x", node="n2").terms.uuid == "GPU-b"
    with pytest.raises(DeviceError, match=r"on node n3: needs 10.0 GiB; there is no GPU"):
        desk.ask("x", 1, node="n3")


def test_nobody_is_given_a_cordoned_gpu_and_nobody_loses_one():
    desk = Desk([gpu("a"), gpu("b", 30)], [demand("x", 10, 2)])
    granted = desk.ask("x")
    desk.devices = [gpu("a", cordoned=True), gpu("b", 30)]
    assert granted.terms.uuid == "GPU-a"
    assert [desk.ask("x", i).terms.uuid for i in (0, 1, 2)] == ["GPU-a", "GPU-b", "GPU-b"]


def test_who_is_not_to_run_gets_nothing():
    desk = Desk([gpu("a")], [demand("x", 10)])
    with pytest.raises(DeviceError, match="y has no claim to a GPU"):
        desk.ask("y")


def test_leases_never_exceed_a_gpu_whoever_asks_first():
    desk = Desk([gpu("a", 24), gpu("b", 24)], [demand("x", 9, 3)], [demand("y", 7, 2)])
    for app, number in (("y", 0), ("x", 0), ("x", 1), ("y", 1), ("x", 2)):
        desk.ask(app, number)
    assert all(total <= 24 * GIB for total in leased(desk.book).values())
    assert sum(leased(desk.book).values()) == 41 * GIB


def test_what_no_demand_names_takes_its_room_until_it_is_gone():
    desk = Desk([gpu("a", 12)], [demand("old", 10)])
    desk.ask("old")
    after = [[demand("new", 10)]]
    assert desk.book.plan(desk.devices, after).refused.keys() == {"new"}
    leaving = desk.book.plan(desk.devices, after, without=["old"])
    assert leaving.slots == {"new": ("GPU-a",)}


def test_what_was_estimated_is_given_back_when_it_is_measured():
    desk = Desk([gpu("a", 24)], [demand("x", 20)])
    assert desk.ask("x", estimated=True).estimated
    desk.book.measured("x", 6 * GIB)
    (lease,) = desk.book.leases
    assert (lease.terms.bytes, lease.estimated) == (6 * GIB, False)
    # More than it has it never gets: it is capped at it.
    desk.book.measured("x", 9 * GIB)
    assert leased(desk.book) == {"GPU-a": 6 * GIB}


def test_a_lease_counts_by_what_was_granted_not_by_what_would_be_now():
    desk = Desk([gpu("a", 24)], [demand("x", 6)])
    desk.ask("x")
    desk.waves = ([demand("x", 20)], [demand("y", 18)])
    assert desk.book.plan(desk.devices, desk.waves).slots["y"] == ("GPU-a",)


def test_after_a_restart_replicas_say_what_they_hold():
    desk = Desk([gpu("a", 12)], [demand("x", 10)])
    held = desk.ask("x")
    book = LeaseBook()
    assert not book.renew("x#0", 1.0)
    book.restore(held)
    assert book.leases == [held]
    assert book.plan(desk.devices, [[demand("y", 10)]]).refused.keys() == {"y"}
