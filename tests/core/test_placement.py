"""Which GPU each replica goes to: what always holds, how well, how fast; what a refusal says."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from dataclasses import astuple, replace

import pytest

from serving.core.placement import Demand, Device, place
from tests.core.placements import GIB, optimum, random_demands, random_devices, score


def gpu(name: str, gib: float = 24.0, **facts) -> Device:
    kind = facts.pop("type", "L4")
    return Device(f"GPU-{name}", "node-1", kind, int(gib * GIB), **facts)


def demand(app: str, gib: float, replicas: int = 1, **facts) -> Demand:
    return Demand(app, app, "1", replicas, int(gib * GIB), **facts)


def free_after(devices, demands, placed) -> dict[str, int]:
    free = {d.uuid: d.memory_bytes - d.used_by_others for d in devices}
    for d in demands:
        for uuid in placed.slots[d.app]:
            free[uuid] -= d.bytes
    return free


def check(devices, demands, placed) -> None:
    """What holds for every placement, however hard the instance."""
    by_uuid = {d.uuid: d for d in devices}
    free = free_after(devices, demands, placed)
    assert all(left >= 0 for left in free.values()), "over a GPU's memory"
    assert placed.slots.keys() == {d.app for d in demands}
    for d in demands:
        slots = placed.slots[d.app]
        assert slots[: len(d.kept)] == d.kept, "a running replica was moved"
        new = [by_uuid[uuid] for uuid in slots[len(d.kept) :]]
        assert not any(device.cordoned for device in new)
        assert all(d.device_types is None or device.type in d.device_types for device in new)
        assert len(new) == (0 if d.app in placed.refused else d.missing), "whole or not at all"
        if d.app in placed.refused:
            assert not fits(d, devices, free), "there was room"


def fits(d: Demand, devices, free) -> bool:
    fit = [
        x
        for x in devices
        if not x.cordoned and (d.device_types is None or x.type in d.device_types)
    ]
    return sum(free[x.uuid] // d.bytes for x in fit) >= d.missing


def test_ten_thousand_random_instances_keep_every_promise():
    refused = 0
    for seed in range(10_000):
        rng = random.Random(seed)
        devices = random_devices(rng, rng.randint(0, 6))
        demands = random_demands(rng, devices, rng.randint(1, 5), 4)
        placed = place(devices, demands)
        check(devices, demands, placed)
        refused += bool(placed.refused)
    assert 1_000 < refused < 9_000, "the instances are all easy, or all impossible"


@pytest.mark.parametrize("seed", range(40))
def test_larger_instances_keep_every_promise(seed):
    rng = random.Random(seed)
    devices = random_devices(rng, rng.randint(10, 60))
    demands = random_demands(rng, devices, rng.randint(10, 100), 8)
    check(devices, demands, place(devices, demands))


def test_small_instances_are_within_five_percent_of_the_optimum():
    """Each of them, by each part of the score in turn, as far as those before it are equal."""
    for seed in range(150):
        rng = random.Random(seed)
        devices = random_devices(rng, rng.randint(1, 5))
        demands = random_demands(rng, devices, rng.randint(1, 6), 3)
        found = score(devices, demands, place(devices, demands))
        for ours, best in zip(astuple(found), astuple(optimum(devices, demands)), strict=True):
            assert ours <= 1.05 * best, f"seed {seed}"
            if ours != best:
                break


def test_mid_size_instances_are_within_five_percent_of_the_optimum_together():
    ours, best = Counter(), Counter()
    for seed in range(25):
        rng = random.Random(seed)
        devices = random_devices(rng, 8)
        demands = random_demands(rng, devices, 10, 3)
        ours["placed"] -= score(devices, demands, place(devices, demands)).left_out - 10
        best["placed"] -= optimum(devices, demands).left_out - 10
        ours["gpus"] += score(devices, demands, place(devices, demands)).gpus
        best["gpus"] += optimum(devices, demands).gpus
    assert ours["placed"] >= 0.95 * best["placed"]
    assert ours["gpus"] <= 1.05 * best["gpus"]


def test_500_replicas_on_200_gpus_take_less_than_a_second():
    times = []
    for seed in range(5):
        rng = random.Random(seed)
        devices = random_devices(rng, 200)
        demands = random_demands(rng, devices, 250, 2)
        total = 0
        for i, d in enumerate(demands):
            demands[i] = replace(d, replicas=max(2, len(d.kept)), kept=d.kept[:2])
            total += demands[i].replicas
        assert total == 500
        started = time.perf_counter()
        place(devices, demands)
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 1.0


def test_the_order_of_the_input_does_not_matter():
    for seed in range(50):
        rng = random.Random(seed)
        devices = random_devices(rng, 5)
        demands = random_demands(rng, devices, 6, 3)
        placed = place(devices, demands)
        assert place(devices[::-1], demands[::-1]) == placed


def test_applications_share_a_gpu():
    placed = place([gpu("a"), gpu("b")], [demand("x", 10), demand("y", 10)])
    assert placed.slots == {"x": ("GPU-a",), "y": ("GPU-a",)}


def test_replicas_of_one_application_keep_apart():
    placed = place([gpu("a"), gpu("b")], [demand("x", 10, 2)])
    assert sorted(placed.slots["x"]) == ["GPU-a", "GPU-b"]


def test_a_replica_that_cannot_keep_apart_is_placed_all_the_same():
    placed = place([gpu("a")], [demand("x", 10, 2)])
    assert placed.slots["x"] == ("GPU-a", "GPU-a")


def test_the_arms_of_a_rollout_keep_apart():
    stable = demand("stable", 5, kept=("GPU-a",), group="m")
    placed = place([gpu("a"), gpu("b")], [stable, demand("canary", 5, group="m")])
    assert placed.slots == {"stable": ("GPU-a",), "canary": ("GPU-b",)}


def test_a_group_named_like_an_application_is_not_that_application():
    other = demand("m", 5, kept=("GPU-a",))
    placed = place([gpu("a"), gpu("b")], [other, demand("x", 5, group="m")])
    assert placed.slots["x"] == ("GPU-a",)


def test_a_throttled_gpu_is_the_last_resort():
    devices = [gpu("a", throttled=True), gpu("b")]
    running = demand("old", 5, kept=("GPU-a",))
    assert place(devices, [running, demand("x", 10, 2)]).slots["x"] == ("GPU-b", "GPU-b")
    assert sorted(place(devices, [running, demand("x", 15, 2)]).slots["x"]) == ["GPU-a", "GPU-b"]


def test_a_cordoned_gpu_keeps_what_runs_on_it_and_gets_nothing_new():
    devices = [gpu("a", cordoned=True), gpu("b")]
    placed = place(devices, [demand("x", 5, 2, kept=("GPU-a",))])
    assert placed.slots["x"] == ("GPU-a", "GPU-b")


def test_a_replica_stays_on_a_gpu_that_is_gone_or_overfull():
    devices = [gpu("a", used_by_others=23 * GIB), gpu("b")]
    placed = place(devices, [demand("x", 5, 3, kept=("GPU-a", "GPU-gone"))])
    assert placed.slots["x"] == ("GPU-a", "GPU-gone", "GPU-b")


def test_mig_slices_are_devices():
    slices = [
        Device(f"MIG-{i}", "node-1", "NVIDIA A100 MIG 1g.10gb", 10 * GIB, mig=True) for i in (1, 2)
    ]
    placed = place(slices, [demand("x", 6, 2)])
    assert sorted(placed.slots["x"]) == ["MIG-1", "MIG-2"]
    assert "needs 10.1 GiB" in place(slices, [demand("y", 10.01)]).refused["y"]


def test_other_processes_take_room():
    devices = [gpu("a", used_by_others=20 * GIB), gpu("b", 8)]
    assert place(devices, [demand("x", 5)]).slots["x"] == ("GPU-b",)


def test_several_small_applications_go_before_a_large_one():
    placed = place([gpu("a")], [demand("big", 20), demand("x", 12), demand("y", 12)])
    assert placed.refused.keys() == {"big"}


def test_a_refusal_names_need_and_largest_free():
    devices = [gpu("a", used_by_others=15 * GIB), gpu("b", 8)]
    placed = place(devices, [demand("x", 14.2, basis="for max_size 64")])
    expected = "needs 14.2 GiB for max_size 64; the largest free is 9.0 GiB on GPU-a"
    assert placed.refused == {"x": expected}
    assert placed.slots == {"x": ()}


def test_a_refusal_never_reads_as_if_it_did_fit():
    placed = place([gpu("a", 9.98)], [demand("x", 9.99)])
    assert placed.refused["x"] == "needs 10.0 GiB; the largest free is 9.9 GiB on GPU-a"


def test_a_refusal_says_for_how_many_there_is_room():
    placed = place([gpu("a"), gpu("b", 8)], [demand("x", 10, 3)])
    expected = "needs 3 × 10.0 GiB; there is room for 2; the largest free is 24.0 GiB on GPU-a"
    assert placed.refused["x"] == expected


@pytest.mark.parametrize(
    ("devices", "ending"),
    [
        ([], "there is no GPU"),
        ([gpu("a")], "there is none of that type: L4"),
        (
            [gpu("a", type="H100", cordoned=True)],
            "every GPU for it is cordoned: GPU-a",
        ),
        (
            [gpu("a", 2, type="H100"), gpu("b", type="H100", cordoned=True)],
            "the largest free is 2.0 GiB on GPU-a (1 cordoned)",
        ),
    ],
)
def test_a_refusal_says_what_stands_in_the_way(devices, ending):
    placed = place(devices, [demand("x", 3, device_types=frozenset({"H100"}))])
    assert placed.refused["x"] == f"needs 3.0 GiB on H100; {ending}"


def test_a_refused_application_keeps_what_it_has():
    placed = place([gpu("a", 6)], [demand("x", 5, 2, kept=("GPU-a",))])
    assert placed.slots["x"] == ("GPU-a",)
    assert placed.refused["x"] == "needs 5.0 GiB; the largest free is 1.0 GiB on GPU-a"
