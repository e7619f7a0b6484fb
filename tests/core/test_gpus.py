"""What errors of a GPU mean, how well it is, and which GPUs a process is allowed."""

from __future__ import annotations

import json

import pytest

from serving.core.gpus import (
    Condition,
    Gpu,
    GpuProcess,
    GpuSample,
    Health,
    NodeReport,
    XidClass,
    XidEvent,
    condition,
    faults,
    visible,
    xid_class,
)

SAMPLE = GpuSample(
    1000.0, throttle=(), ecc_uncorrected=0.0, remap_pending=False, remap_failure=False
)


def sample(**facts: object) -> GpuSample:
    return GpuSample(**{**SAMPLE.to_dict(), "throttle": (), **facts})


def xid(number: int) -> XidEvent:
    return XidEvent("GPU-a", number, 1000.0)


@pytest.mark.parametrize("number", [13, 31, 43])
def test_errors_of_programs(number: int) -> None:
    assert xid_class(number) is XidClass.APPLICATION


@pytest.mark.parametrize("number", [48, 64, 74, 79, 94, 95, 140])
def test_errors_of_the_hardware(number: int) -> None:
    assert xid_class(number) is XidClass.HARDWARE


def test_other_errors_are_neither() -> None:
    assert {xid_class(number) for number in (45, 63, 119, 120, 154)} == {XidClass.OTHER}
    assert xid(45).sentence == "XID 45"
    assert xid(63).sentence == "XID 63 (memory row remapped)"
    assert xid(154).sentence == "XID 154 (GPU recovery action changed)"
    assert xid(79).sentence == "XID 79 (GPU has fallen off the bus)"


@pytest.mark.parametrize(
    ("found", "health", "reason"),
    [
        (SAMPLE, Health.OK, None),
        (GpuSample(1.0), Health.OK, None),
        (sample(throttle=("sw_power_cap", "sync_boost")), Health.OK, None),
        (
            sample(throttle=("sw_power_cap", "hw_slowdown", "hw_thermal_slowdown")),
            Health.THROTTLED,
            "throttled: hw_slowdown, hw_thermal_slowdown",
        ),
        (None, Health.UNKNOWN, "no measurement"),
        (sample(ecc_uncorrected=2.0), Health.DEGRADED, "2 uncorrected ECC errors"),
        (sample(remap_pending=True), Health.DEGRADED, "a remapped memory row waits for a reset"),
        (sample(remap_failure=True), Health.FAILED, "a memory row could not be remapped"),
        (GpuSample(1.0, lost=True), Health.FAILED, "it does not answer"),
    ],
)
def test_health_has_its_reason(found: GpuSample | None, health: Health, reason: str | None) -> None:
    assert condition(found) == Condition(health, (reason,) if reason else ())


def test_the_worst_sign_decides_and_all_are_told() -> None:
    found = condition(sample(throttle=("hw_slowdown",), remap_pending=True), [xid(79), xid(31)])
    assert found.health is Health.FAILED
    assert found.reasons == (
        "XID 79 (GPU has fallen off the bus)",
        "a remapped memory row waits for a reset",
        "throttled: hw_slowdown",
    )


def test_an_error_of_a_program_leaves_a_gpu_well() -> None:
    assert condition(SAMPLE, [xid(31)]) == Condition()


def test_firmware_that_does_not_recover_is_a_fault_and_one_error_of_it_is_none() -> None:
    first, second = XidEvent("GPU-a", 119, 1000.0), XidEvent("GPU-a", 120, 4600.0)
    late = XidEvent("GPU-a", 119, 8201.0)
    assert condition(SAMPLE, [first, xid(31)]) == Condition()
    reason = "XID 120 (GSP error): its firmware failed twice within an hour"
    assert condition(SAMPLE, [first, second]) == Condition(Health.FAILED, (reason,))
    assert condition(SAMPLE, [second, late]) == Condition()
    assert faults(SAMPLE, SAMPLE, [first]) == ()
    assert faults(SAMPLE, SAMPLE, [second], [first]) == (reason,)
    assert faults(SAMPLE, SAMPLE, [late], [second]) == ()
    assert faults(SAMPLE, SAMPLE, [xid(31)], [first, second]) == (), "that was so before"


def test_what_makes_a_gpu_unfit_is_what_happens_to_it() -> None:
    assert faults(SAMPLE, SAMPLE, [xid(13)]) == ()
    assert faults(SAMPLE, SAMPLE, [xid(48)]) == ("XID 48 (double-bit ECC error)",)
    rise = faults(sample(ecc_uncorrected=1.0), sample(ecc_uncorrected=3.0), [])
    assert rise == ("uncorrected ECC errors rose from 1 to 3",)
    assert faults(SAMPLE, sample(remap_failure=True), []) == ("a memory row could not be remapped",)
    assert faults(SAMPLE, GpuSample(1.0, lost=True), []) == ("it does not answer",)


@pytest.mark.parametrize(
    "bad", [sample(ecc_uncorrected=3.0), sample(remap_failure=True), GpuSample(1.0, lost=True)]
)
def test_what_was_so_before_is_not_news(bad: GpuSample) -> None:
    """Else a GPU that a person puts back to use would be taken out again at once."""
    assert faults(None, bad, []) == ()
    assert faults(bad, bad, []) == ()


def test_a_driver_that_counts_anew_is_no_fault() -> None:
    assert faults(sample(ecc_uncorrected=3.0), sample(ecc_uncorrected=0.0), []) == ()
    assert faults(sample(ecc_uncorrected=None), sample(ecc_uncorrected=4.0), []) == ()


def test_a_report_survives_json() -> None:
    processes = (GpuProcess(1, None), GpuProcess(2, 7))
    full = GpuSample(1.0, 2.0, 3.0, 0.5, throttle=("hw_slowdown",), processes=processes)
    gpus = (
        (Gpu("GPU-a", "n", 0, "A100", 80, "0:1", None, True), full),
        (Gpu("MIG-a", "n", 0, "A100 1g", None, "0:1", "GPU-a"), GpuSample(1.0, lost=True)),
    )
    report = NodeReport("n", "host", "580", gpus, (xid(79),), "a problem")
    assert NodeReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


WHOLE = Gpu("GPU-a1", "n", 0, "A100", 80, divided=True)
SLICE = Gpu("MIG-s1", "n", 0, "A100 1g", 10, mig_parent="GPU-a1")
OTHER_SLICE = Gpu("MIG-s2", "n", 0, "A100 1g", 10, mig_parent="GPU-a1")
NEXT = Gpu("GPU-b2", "n", 1, "A100", 80)
ALL = [WHOLE, SLICE, OTHER_SLICE, NEXT]


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        (None, ALL),
        ("0", [WHOLE, SLICE, OTHER_SLICE]),
        (" 1 , 0", ALL),
        ("MIG-s2", [WHOLE, OTHER_SLICE]),
        ("GPU-b,GPU-a", ALL),
        ("", []),
        ("-1", []),
        ("7,1", []),
        ("1,NoDevFiles,0", [NEXT]),
    ],
)
def test_cuda_visible_devices(setting: str | None, allowed: list[Gpu]) -> None:
    assert visible(ALL, setting) == allowed
