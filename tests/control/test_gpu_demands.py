"""What applications ask of GPUs, and what GPUs have for them."""

from __future__ import annotations

import pytest

from serving.control.fleet import Replica
from serving.control.gpu_demands import Needs, devices, used_by_others, wants_gpu
from serving.control.gpus import Standing
from serving.control.leases import Lease
from serving.core.gpus import Gpu, GpuProcess, GpuSample, condition
from serving.core.memory_profile import MemoryProfile, estimated_need, with_margin
from serving.core.replica import GpuLease, ReplicaSpec

GIB = 1 << 30


def standing(processes=None, used=0, reserved=0, loaded=(), sample=True, **gpu_facts) -> Standing:
    facts = {"name": "NVIDIA L4", "memory_bytes": 24 * GIB, **gpu_facts}
    gpu = Gpu("GPU-a", "n1", 0, **facts)
    found = None
    if sample:
        rows = processes and tuple(GpuProcess(*p) for p in processes)
        found = GpuSample(
            0.0, memory_used=used * GIB, memory_reserved=reserved * GIB, processes=rows
        )
    replicas = tuple(Replica({"pid": pid, "app": "x", "state": "ready"}, 0.0) for pid in loaded)
    return Standing(gpu, "host", 0.0, found, condition(found), None, replicas, ())


def lease(pid: int, gib: int) -> Lease:
    terms = GpuLease("id", "GPU-a", gib * GIB, 24 * GIB)
    return Lease(terms, "x", f"x#{pid}", "n1", pid, False, 0.0, 0.0)


@pytest.mark.parametrize(
    ("seen", "own", "others"),
    [
        # Nobody has measured anything.
        (standing(sample=False), [lease(1, 10)], 0),
        # By process: ours does not count, whatever it holds; what the driver keeps does.
        (
            standing([(1, 9 * GIB), (2, 3 * GIB)], used=12, reserved=1, loaded=[1]),
            [lease(1, 10)],
            4,
        ),
        # Ours has a lease, and no memory yet: the lease hides nothing.
        (standing([(2, 3 * GIB)], used=3), [lease(1, 10)], 3),
        # Ours has loaded, and is known to NVML by another number.
        (standing([(77, 9 * GIB), (2, 3 * GIB)], used=12, loaded=[1]), [lease(1, 10)], 2),
        # NVML names processes without their memory, or none at all.
        (standing([(1, None), (2, None)], used=12, loaded=[1]), [lease(1, 10)], 2),
        (standing(None, used=12, loaded=[1]), [lease(1, 10)], 2),
        (standing(None, used=4, loaded=[1]), [lease(1, 10)], 0),
        (standing([(2, 3 * GIB)], used=3), [], 3),
    ],
)
def test_what_others_use(seen, own, others):
    assert used_by_others(seen, own) == others * GIB


def test_what_can_be_placed_on():
    assert devices([standing(divided=True)], []) == []
    (shared,) = devices([standing(memory_bytes=None)], [])
    assert shared.memory_bytes == 0, "there, with no room for anything"
    (silent,) = devices([standing(sample=False)], [])
    assert silent.throttled, "nobody knows that it is well"
    assert not silent.cordoned


@pytest.mark.parametrize(
    ("settings", "with_gpus", "without"),
    [
        ({}, True, False),
        ({"device": "cpu"}, False, False),
        ({"device": "cuda"}, True, True),
        ({"onnx": {"providers": ["cpu"]}}, False, False),
        ({"onnx": {"providers": ["cuda", "cpu"]}}, True, False),
    ],
)
def test_who_wants_a_gpu(settings, with_gpus, without):
    spec = ReplicaSpec("m", "1", "d", "", "", **settings)
    assert wants_gpu(spec, there_are_any=True) == with_gpus
    assert wants_gpu(spec, there_are_any=False) == without


def spec(**more) -> ReplicaSpec:
    return ReplicaSpec("m", "1", "digest", "", "", max_size=32, **more)


def profile(device_type: str, weights: int) -> MemoryProfile:
    return MemoryProfile(device_type, "torch", weights, 0, {32: 100})


def test_a_need_is_said_or_measured_or_estimated_in_this_order():
    needs = Needs(0.1, lambda digest: {"digest": 3 * GIB}[digest])
    estimate = needs.of(spec(), ["NVIDIA L4"])
    assert estimate.bytes == with_margin(estimated_need(3 * GIB), 0.1)
    assert estimate.estimated
    assert estimate.basis == "for max_size 32, estimated from 3.0 GiB of files"
    needs.learn("digest", profile("NVIDIA L4", 800))
    measured = needs.of(spec(), ["NVIDIA L4"])
    assert (measured.bytes, measured.basis, measured.estimated) == (1000, "for max_size 32", False)
    said = needs.of(spec(gpu_memory_bytes=7), ["NVIDIA L4"])
    assert (said.bytes, said.basis, said.estimated) == (7, "as gpu_memory_bytes says", False)


def test_a_need_is_that_of_the_worst_type_that_is_there():
    needs = Needs(0.0, lambda _: None)
    needs.learn("digest", profile("NVIDIA L4", 900))
    needs.learn("digest", profile("NVIDIA H100", 1900))
    assert needs.of(spec(), ["NVIDIA L4"]).bytes == 1000
    assert needs.of(spec(), ["NVIDIA L4", "NVIDIA H100"]).bytes == 2000
    # What was measured elsewhere is better than a guess.
    assert needs.of(spec(), ["NVIDIA A10G"]).bytes == 2000


def test_the_lowest_ceiling_of_a_lease_stays():
    needs = Needs(0.0, lambda _: None)
    assert needs.learn("digest", profile("NVIDIA L4", 1), None, 5 * GIB)
    assert needs.ceiling("digest", "NVIDIA L4", 5 * GIB) is None
    assert needs.learn("digest", profile("NVIDIA L4", 1), 16, 5 * GIB)
    assert not needs.learn("digest", profile("NVIDIA L4", 1), 24, 5 * GIB)
    assert not needs.learn("digest", profile("NVIDIA L4", 1), None, 5 * GIB)
    assert needs.ceiling("digest", "NVIDIA L4", 5 * GIB) == 16
    assert needs.ceiling("digest", "NVIDIA L4", 4 * GIB) == 16
    assert needs.ceiling("digest", "NVIDIA H100", 5 * GIB) is None
    assert [(row.ceiling, row.lease_bytes) for row in needs.rows("digest")] == [(16, 5 * GIB)]


def test_what_ran_out_of_a_small_lease_puts_no_limit_on_a_larger_one():
    needs = Needs(0.0, lambda _: None)
    needs.learn("digest", profile("NVIDIA L4", 1), 16, 1 * GIB)
    assert needs.ceilings("digest") == {"NVIDIA L4": 16}
    assert needs.ceiling("digest", "NVIDIA L4", 3 * GIB) is None
    # The larger one knows better, whatever those with the small one still say.
    assert needs.learn("digest", profile("NVIDIA L4", 1), 64, 3 * GIB)
    assert not needs.learn("digest", profile("NVIDIA L4", 1), 16, 1 * GIB)
    assert needs.ceiling("digest", "NVIDIA L4", 3 * GIB) == 64
    assert needs.learn("digest", profile("NVIDIA L4", 1), None, 4 * GIB)
    assert not needs.learn("digest", profile("NVIDIA L4", 1), 64, 3 * GIB)
    assert needs.ceilings("digest") == {}


def test_a_ceiling_of_an_unknown_lease_is_shown_and_holds_for_none():
    needs = Needs(0.0, lambda _: None)
    needs.learn("digest", profile("NVIDIA L4", 1), 16)
    assert needs.ceilings("digest") == {"NVIDIA L4": 16}
    assert needs.ceiling("digest", "NVIDIA L4", 1) is None
