"""The inventory of GPUs: what reports make of it, and what cordons outlive."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.control.controller import Controller
from serving.control.gpu_views import gpus_view
from serving.control.gpus import FATAL_WINDOW_S, FORGET_S, STALE_S
from serving.control.metrics import exposition
from serving.core.gpus import Gpu, GpuProcess, GpuSample, NodeReport, XidEvent
from serving.errors import ConflictError, InvalidRequest, NotFound, StoreError
from serving.metrics import METRICS
from tests.control.world import World

GIB = 1 << 30
A = Gpu("GPU-a1b2", "n1", 0, "NVIDIA A100", 80 * GIB, "0:1")
B = Gpu("GPU-a1c3", "n1", 1, "NVIDIA A100", 80 * GIB, "0:2")
SAMPLE = GpuSample(
    1000.0,
    memory_used=2.0 * GIB,
    memory_reserved=1.0 * GIB,
    utilization=0.25,
    power_w=100.0,
    energy_j=500.0,
    throttle=(),
    ecc_uncorrected=0.0,
    processes=(GpuProcess(1, 2 * GIB), GpuProcess(77, None)),
)


def report(
    *gpus: tuple[Gpu, GpuSample], xids: tuple[XidEvent, ...] = (), problem: str = ""
) -> dict[str, Any]:
    return NodeReport("n1", "host-1", "580", gpus, xids, problem).to_dict()


def both(xids: tuple[XidEvent, ...] = ()) -> dict[str, Any]:
    return report((A, SAMPLE), (B, SAMPLE), xids=xids)


def xid(gpu: Gpu, number: int, at: float = 1.0) -> XidEvent:
    return XidEvent(gpu.uuid, number, at)


def changed(sample: GpuSample, **facts: Any) -> GpuSample:
    return GpuSample.from_dict({**sample.to_dict(), **facts})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def view(controller: Controller) -> dict[str, Any]:
    return gpus_view(controller.gpus, controller.ledger.gpu_price, controller.placer.stays)


def rows(controller: Controller) -> dict[str, dict[str, Any]]:
    return {gpu["uuid"]: gpu for gpu in view(controller)["gpus"]}


def reasons(world: World) -> dict[str, str]:
    return {row.uuid: row.reason for row in world.store.cordons()}


def test_without_a_report_there_is_no_gpu(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        assert view(controller) == {"gpus": [], "nodes": [], "absent": []}

    run(scenario())


def test_a_gpu_is_shown_with_who_runs_on_it(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        (info,) = world.cluster.announcements()
        controller.announce({**info, "gpu": A.uuid, "lease_bytes": 10 * GIB})
        await controller.gpus.report(both())
        world.monotonic += 1.5
        gpu = rows(controller)[A.uuid]
        assert gpu["memory"] == {
            "total": 80 * GIB,
            "leased": 10 * GIB,
            "used": 2.0 * GIB,
            "reserved": 1.0 * GIB,
            "free": 77.0 * GIB,
        }
        (replica,) = gpu["replicas"]
        assert (replica["model"], replica["version"], replica["memory_bytes"]) == (
            "m",
            "1",
            2 * GIB,
        )
        assert gpu["other_processes"] == [{"pid": 77, "memory_bytes": None}]
        assert (gpu["health"], gpu["reasons"], gpu["cordon"]) == ("ok", [], None)
        # By the price book: an A100 whose name does not tell how much memory it has has no price.
        assert gpu["usd_per_hour"] is None
        assert (gpu["host"], gpu["age_s"], gpu["sample"]["power_w"]) == ("host-1", 1.5, 100.0)
        other = rows(controller)[B.uuid]
        assert (other["replicas"], len(other["other_processes"])) == ([], 2)

    run(scenario())


def test_what_nobody_measured_is_null(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(report((A, GpuSample(1.0))))
        gpu = rows(controller)[A.uuid]
        unknown = dict.fromkeys(("used", "reserved", "free"))
        assert gpu["memory"] == {"total": 80 * GIB, "leased": 0, **unknown}
        assert gpu["other_processes"] is None
        assert {v for k, v in gpu["sample"].items() if k != "at"} == {None}

    run(scenario())


def test_old_measurements_are_not_believed(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(both())
        world.monotonic += STALE_S + 1
        gpu = rows(controller)[A.uuid]
        assert (gpu["health"], gpu["sample"], gpu["memory"]["used"]) == ("unknown", None, None)
        assert gpu["reasons"] == ["its node's agent was last heard 6 s ago"]
        controller.gpus.expect({"n1": 1.0})
        world.monotonic += FORGET_S
        assert len(rows(controller)) == 2
        controller.gpus.expect({})
        assert rows(controller) == {}

    run(scenario())


def test_an_agent_with_a_problem_and_one_that_never_spoke_are_named(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        controller.gpus.expect({"n1": 1.0, "n2": 1.0})
        await controller.gpus.report(report((A, SAMPLE), problem="NVML has not answered"))
        nodes = view(controller)["nodes"]
        assert [(n["node"], n["problem"]) for n in nodes] == [
            ("n1", "NVML has not answered"),
            ("n2", "Ray counts GPUs here, but no agent has reported them"),
        ]
        assert rows(controller)[A.uuid]["reasons"] == ["NVML has not answered"]

    run(scenario())


def test_an_error_of_the_hardware_cordons_and_says_so_in_the_log(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(both())
        await controller.gpus.report(both((xid(A, 79), xid(B, 31))))
        # Stored before the agent hears that its report has arrived.
        assert reasons(world) == {A.uuid: "XID 79 (GPU has fallen off the bus)"}
        (entry,) = world.store.audit(subject=A.uuid)
        assert (entry.actor, entry.action) == ("controller", "cordon")
        assert entry.body == {"reason": "XID 79 (GPU has fallen off the bus)"}
        found = rows(controller)
        assert (found[A.uuid]["health"], found[B.uuid]["health"]) == ("failed", "ok")
        assert [(e["xid"], e["class"]) for e in found[B.uuid]["xids"]] == [(31, "application")]

    run(scenario())


def test_firmware_errors_cordon_once_they_recur(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(both((xid(A, 119),)))
        await controller.gpus.report(both((xid(A, 119),)))  # a report that comes twice
        assert reasons(world) == {}
        again = XidEvent(A.uuid, 119, xid(A, 119).at + 60)
        await controller.gpus.report(both((again, xid(B, 119))))
        why = "XID 119 (GSP RPC timeout): its firmware failed twice within an hour"
        assert reasons(world) == {A.uuid: why}
        assert rows(controller)[A.uuid]["health"] == "failed"
        await controller.gpus.uncordon(A.uuid, actor="ann", reason="reset")
        await controller.gpus.report(both())
        assert rows(controller)[A.uuid]["health"] == "ok"

    run(scenario())


def test_an_error_before_the_first_measurement_counts(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(report(xids=(xid(A, 48),)))
        assert reasons(world) == {A.uuid: "XID 48 (double-bit ECC error)"}

    run(scenario())


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"ecc_uncorrected": 2.0}, "uncorrected ECC errors rose from 0 to 2"),
        ({"remap_failure": True}, "a memory row could not be remapped"),
        ({"lost": True}, "it does not answer"),
    ],
)
def test_what_is_measured_can_cordon_too(world: World, facts: dict[str, Any], reason: str) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        for sample in (SAMPLE, changed(SAMPLE, **facts)):
            await controller.gpus.report(report((A, sample)))
        assert reasons(world) == {A.uuid: reason}

    run(scenario())


def test_throttling_is_shown_and_cordons_nothing(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(report((A, changed(SAMPLE, throttle=["hw_slowdown"]))))
        assert rows(controller)[A.uuid]["health"] == "throttled"
        assert reasons(world) == {}

    run(scenario())


def test_a_report_that_comes_twice_counts_once(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        for _ in range(2):
            await controller.gpus.report(both((xid(A, 79),)))
        assert controller.gpus.xid_counts() == {(A.uuid, 79): 1}
        await controller.gpus.uncordon(A.uuid, actor="ann", reason="")
        await controller.gpus.report(both())
        assert rows(controller)[A.uuid]["cordon"] is None

    run(scenario())


def test_two_fatal_cuda_errors_cordon_and_one_does_not(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        (info,) = world.cluster.announcements()
        await controller.gpus.report(both())

        def fail(replica: str) -> None:
            why = {"gpu": A.uuid, "fatal": "CUDA error: an illegal memory access"}
            controller.announce({**info, **why, "replica": replica, "state": "failed"})

        fail("r1")
        fail("r1")
        world.monotonic += FATAL_WINDOW_S + 1
        fail("r2")
        await controller.step(look=True)
        assert reasons(world) == {}
        fail("r3")
        await controller.step(look=True)
        assert reasons(world) == {
            A.uuid: "2 fatal CUDA errors within an hour, the last one: "
            "CUDA error: an illegal memory access"
        }

    run(scenario())


def test_a_fatal_cuda_error_is_remembered_by_the_next_controller(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await world.apply(controller, {"m": {"version": "1"}})
        await world.settle(controller)
        (info,) = world.cluster.announcements()

        async def fail(replica: str) -> None:
            why = {"gpu": A.uuid, "fatal": "CUDA error"}
            controller.announce({**info, **why, "replica": replica, "state": "failed"})
            await controller.watch()

        await fail("r1")
        controller = await world.controller()
        await controller.gpus.report(both())
        await fail("r1")
        assert reasons(world) == {}, "it is the same one"
        await fail("r2")
        assert list(reasons(world)) == [A.uuid]
        await controller.gpus.uncordon(A.uuid, actor="alice", reason="")
        controller = await world.controller()
        await fail("r3")
        assert reasons(world) == {}, "what was held against it is forgotten"

    run(scenario())


def test_a_cordon_outlives_the_controller(world: World) -> None:
    async def scenario() -> None:
        first = await world.controller()
        await first.gpus.report(both())
        assert await first.gpus.cordon("GPU-a1b", actor="ann", reason="smells") == A.uuid
        second = await world.controller()
        absent = view(second)["absent"]
        assert [(row["uuid"], row["reason"]) for row in absent] == [(A.uuid, "smells")]
        await second.gpus.report(both())
        assert view(second)["absent"] == []
        assert rows(second)[A.uuid]["cordon"] == {
            "uuid": A.uuid, "reason": "smells", "actor": "ann", "at": 1000.0,
        }  # fmt: skip
        assert await second.gpus.uncordon(A.uuid, actor="bob", reason="cleaned") == A.uuid
        assert rows(second)[A.uuid]["cordon"] is None
        assert reasons(world) == {}
        entries = world.store.audit(subject=A.uuid)
        assert [(e.action, e.actor, e.body["reason"]) for e in entries] == [
            ("cordon", "ann", "smells"),
            ("uncordon", "bob", "cleaned"),
        ]

    run(scenario())


def test_uncordoned_is_forgiven(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(both((xid(A, 94),)))
        await controller.gpus.uncordon(A.uuid, actor="ann", reason="replaced")
        await controller.gpus.report(both())
        assert rows(controller)[A.uuid]["health"] == "ok"
        await controller.gpus.report(both((xid(A, 94, at=2.0),)))
        assert list(reasons(world)) == [A.uuid]

    run(scenario())


def test_a_slice_is_as_well_and_as_usable_as_its_gpu(world: World) -> None:
    whole = Gpu("GPU-w", "n1", 0, "A100", 80 * GIB, divided=True)
    part = Gpu("MIG-p", "n1", 0, "A100 MIG 1g.10gb", 10 * GIB, mig_parent="GPU-w")

    async def scenario() -> None:
        controller = await world.controller()
        hot = changed(SAMPLE, throttle=["hw_thermal_slowdown"])
        await controller.gpus.report(report((whole, hot), (part, SAMPLE)))
        assert rows(controller)["MIG-p"]["reasons"] == ["throttled: hw_thermal_slowdown"]
        await controller.gpus.cordon("GPU-w", actor="ann", reason="hot")
        assert rows(controller)["MIG-p"]["cordon"]["uuid"] == "GPU-w"
        with pytest.raises(ConflictError, match="cordoned with its GPU; uncordon that: GPU-w"):
            await controller.gpus.uncordon("MIG-p", actor="ann", reason="")
        await controller.gpus.uncordon("GPU-w", actor="ann", reason="")
        await controller.gpus.report(report((whole, hot), (part, SAMPLE), xids=(xid(part, 95),)))
        found = rows(controller)
        assert (found["MIG-p"]["health"], found["GPU-w"]["health"]) == ("failed", "throttled")
        assert list(reasons(world)) == ["MIG-p"]

    run(scenario())


def test_wrong_names_are_refused_with_what_there_is(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        with pytest.raises(NotFound, match="no GPU 'GPU-x'; there is none on any node"):
            await controller.gpus.cordon("GPU-x", actor="ann", reason="r")
        await controller.gpus.report(both())
        with pytest.raises(NotFound, match=f"there are: {A.uuid}, {B.uuid}"):
            await controller.gpus.cordon("GPU-x", actor="ann", reason="r")
        with pytest.raises(InvalidRequest, match=f"beginning of {A.uuid}, {B.uuid}; write more"):
            await controller.gpus.cordon("GPU-a1", actor="ann", reason="r")
        with pytest.raises(ConflictError, match=f"{A.uuid} is not cordoned"):
            await controller.gpus.uncordon(A.uuid, actor="ann", reason="r")

    run(scenario())


def test_a_cordon_that_could_not_be_stored_holds_and_is_stored_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        controller = await world.controller()

        def full(*_: object) -> None:
            raise StoreError("the disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(world.store, "save_cordons", full)
            with pytest.raises(StoreError):
                await controller.gpus.report(both((xid(A, 79),)))
            with pytest.raises(StoreError):
                await controller.gpus.cordon(B.uuid, actor="ann", reason="r")
            found = rows(controller)
            # What a person asked for was refused; what happened has happened.
            assert [bool(found[g.uuid]["cordon"]) for g in (A, B)] == [True, False]
            assert reasons(world) == {}
        await controller.step(look=False)
        assert list(reasons(world)) == [A.uuid]
        assert len(world.store.audit(subject=A.uuid)) == 1

    run(scenario())


def scraped(controller: Controller) -> dict[tuple[str, frozenset[str]], float]:
    return {
        (s.name, frozenset(s.labels.values())): s.value
        for family in text_string_to_metric_families(exposition(controller, "2.60").decode())
        for s in family.samples
    }


def test_metrics_have_our_names_and_tritons(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        slow = changed(SAMPLE, throttle=["hw_slowdown"], utilization=None)
        await controller.gpus.report(report((A, SAMPLE), (B, slow), xids=(xid(A, 31),)))
        await controller.gpus.cordon(B.uuid, actor="ann", reason="r")
        found = scraped(controller)
        ours, theirs = frozenset({A.uuid, "host-1"}), frozenset({A.uuid})
        for name, labels, value in (
            ("serving_gpu_memory_total_bytes", ours, 80.0 * GIB),
            ("serving_gpu_memory_used_bytes", ours, 2.0 * GIB),
            ("serving_gpu_utilization", ours, 0.25),
            ("serving_gpu_energy_joules_total", ours, 500.0),
            ("serving_gpu_cordoned", ours, 0.0),
            ("serving_gpu_health", ours | {"ok"}, 1.0),
            ("serving_gpu_xid_errors_total", theirs | {"31"}, 1.0),
            ("nv_gpu_utilization", theirs, 0.25),
            ("nv_gpu_power_usage", theirs, 100.0),
            ("nv_gpu_memory_used_bytes", theirs, 2.0 * GIB),
            ("nv_gpu_memory_total_bytes", theirs, 80.0 * GIB),
            ("nv_energy_consumption", theirs, 500.0),
        ):
            assert found[name, labels] == value, name
        other = frozenset({B.uuid, "host-1"})
        assert found["serving_gpu_throttled", other | {"hw_slowdown"}] == 1.0
        assert found["serving_gpu_cordoned", other] == 1.0
        named = {m.name: set(m.labels) for m in METRICS}
        for family in text_string_to_metric_families(exposition(controller, "2.60").decode()):
            if "gpu" in family.name or family.name.startswith("nv_"):
                for one in family.samples:
                    assert set(one.labels) == named[family.name], family.name
        # Not measured: no sample, and not 0.
        assert ("serving_gpu_utilization", other) not in found
        assert ("nv_gpu_utilization", frozenset({B.uuid})) not in found

    run(scenario())


def test_old_measurements_are_in_no_metric(world: World) -> None:
    async def scenario() -> None:
        controller = await world.controller()
        await controller.gpus.report(both())
        world.monotonic += STALE_S + 1
        found = scraped(controller)
        assert found["serving_gpu_health", frozenset({A.uuid, "host-1", "unknown"})] == 1.0
        assert ("nv_gpu_power_usage", frozenset({A.uuid})) not in found

    run(scenario())
