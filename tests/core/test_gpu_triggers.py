"""What points at the version takes it back; what points at a GPU does not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from serving.core.rollout_facts import CanaryGpu, Incident, IncidentKind
from serving.core.rollout_spec import default_trigger
from serving.core.rollout_types import Outcome, Verdict
from serving.core.triggers import evaluate
from tests.core.test_triggers import only, rollout, snapshot

OOM, FATAL, XID, HARDWARE = IncidentKind
GPUS = (CanaryGpu("c#0", "GPU-a", free=0.5, of="its lease"),)


def judged(kind: str, *incidents: Incident, **seen: Any) -> Verdict:
    trial = rollout(kinds=(kind,))
    found = snapshot(incidents=incidents, **{"gpus": GPUS, **seen})
    return only(evaluate(trial, found))


def oom(at: float, count: int = 1, arm: Any = "canary") -> Incident:
    return Incident(at, OOM, arm, "c#0", "GPU-a", count=count)


@pytest.mark.parametrize(
    ("incidents", "outcome"),
    [
        ((), "pass"),
        ((oom(990.0),), "pass"),
        ((oom(980.0), oom(990.0)), "fail"),
        ((oom(990.0, count=2),), "fail"),
        ((oom(930.0), oom(990.0)), "pass"),
        ((oom(990.0, 3), oom(990.0, 1, "stable")), "fail"),
        ((oom(990.0, 3), oom(990.0, 2, "stable")), "hold"),
        ((oom(990.0, 3, "stable"),), "pass"),
    ],
)
def test_two_runs_out_of_memory_in_a_minute(incidents: tuple[Incident, ...], outcome: str) -> None:
    verdict = judged("oom", *incidents, ceilings={"c#0": 16, "c#1": 8})
    assert (verdict.verdict.value, verdict.action) == (outcome, "rollback")
    assert "(runs have at most 8 rows since)" in verdict.sentence


def gpu(
    kind: IncidentKind, uuid: str = "GPU-a", *, alone: bool = True, arm: Any = "canary"
) -> Incident:
    what = {FATAL: "CUDA error: illegal access", XID: "XID 31 (GPU memory page fault)"}.get(
        kind, "XID 79 (GPU has fallen off the bus)"
    )
    return Incident(990.0, kind, arm, "c#0", uuid, what, alone=alone)


@pytest.mark.parametrize(
    ("incidents", "outcome", "says"),
    [
        ((), "pass", "no error on GPU-a"),
        ((gpu(XID),), "fail", "XID 31 (GPU memory page fault) on GPU-a, where only the canary ran"),
        ((gpu(XID, alone=False),), "hold", "on one GPU it may be the GPU, 2 needed"),
        ((gpu(FATAL),), "hold", "CUDA error: illegal access on GPU-a: on one GPU it may be"),
        ((gpu(FATAL), gpu(FATAL)), "hold", "on one GPU it may be the GPU"),
        ((gpu(FATAL), gpu(FATAL, "GPU-b")), "fail", "on 2 GPUs, 2 are too many"),
        ((gpu(FATAL), gpu(XID, "GPU-b", alone=False)), "fail", "on 2 GPUs"),
        (
            (gpu(HARDWARE),),
            "hold",
            "GPU-a: XID 79 (GPU has fallen off the bus), which is the GPU's",
        ),
        ((gpu(HARDWARE), gpu(HARDWARE)), "hold", "which is the GPU's fault"),
        (
            (gpu(HARDWARE), gpu(HARDWARE, "GPU-b")),
            "fail",
            "the hardware of 2 GPUs under the canary, 2 are too many",
        ),
        # Shared with stable, or at the same time under stable alone: it is not the version.
        (
            (gpu(HARDWARE), gpu(HARDWARE, "GPU-b"), gpu(HARDWARE, arm="stable")),
            "hold",
            "which is the GPU's fault",
        ),
        (
            (gpu(HARDWARE), gpu(HARDWARE, "GPU-b"), gpu(HARDWARE, "GPU-c", arm="stable")),
            "hold",
            "which is the GPU's fault",
        ),
        # What its hardware's failure entails says nothing of the version.
        ((gpu(HARDWARE), gpu(XID), gpu(FATAL)), "hold", "which is the GPU's fault"),
        ((gpu(HARDWARE), gpu(FATAL), gpu(FATAL, "GPU-b")), "hold", "on one GPU it may be the GPU"),
        ((gpu(XID, arm="stable"),), "pass", "no error"),
    ],
)
def test_errors_of_programs_blame_the_version_and_errors_of_gpus_do_not(
    incidents: tuple[Incident, ...], outcome: str, says: str
) -> None:
    verdict = judged("gpu_health", *incidents)
    assert (verdict.verdict.value, verdict.action) == (outcome, "rollback")
    assert says in verdict.sentence


def test_a_gpu_that_is_ill_or_not_measured_decides_nothing() -> None:
    ill = CanaryGpu("c#0", "GPU-a", ill="3 uncorrected ECC errors")
    verdict = judged("gpu_health", gpu(XID), gpus=(ill,))
    assert verdict.verdict is Outcome.HOLD
    assert "GPU-a: 3 uncorrected ECC errors, which is the GPU's fault" in verdict.sentence
    verdict = judged("gpu_health", gpus=(CanaryGpu("c#0", "GPU-a", measured=False),))
    assert verdict.verdict is Outcome.HOLD
    assert "GPU-a is not measured" in verdict.sentence
    # Its replicas moved, and the other GPUs have been well for some minutes.
    old = replace(gpu(HARDWARE, "GPU-z"), at=1.0)
    assert judged("gpu_health", old).verdict is Outcome.PASS


@pytest.mark.parametrize(
    ("free", "outcome"), [((0.5,), "pass"), ((0.5, 0.04), "fail"), ((0.5, None), "hold")]
)
def test_headroom_is_the_least_of_all_replicas(
    free: tuple[float | None, ...], outcome: str
) -> None:
    gpus = tuple(CanaryGpu(f"c#{i}", "GPU-a", free=f, of="its lease") for i, f in enumerate(free))
    verdict = judged("gpu_memory_headroom", gpus=gpus)
    assert (verdict.verdict.value, verdict.action) == (outcome, "pause")
    if outcome == "fail":
        assert "replica c#1 has 4.0 % of its lease free, at least 5.0 % asked" in verdict.sentence


@pytest.mark.parametrize("kind", ["gpu_health", "gpu_memory_headroom"])
def test_a_canary_without_a_gpu_passes(kind: str) -> None:
    verdict = judged(kind, gpus=())
    assert verdict.sentence == f"{kind}: no replica of the canary is on a GPU: passes"


def test_they_have_no_share_of_the_error_budget() -> None:
    for kind in ("oom", "gpu_health", "gpu_memory_headroom"):
        assert default_trigger(kind).weight == 0  # type: ignore[arg-type]


def test_incidents_survive_a_restart() -> None:
    for incident in (oom(1.0, 3), gpu(XID, alone=False)):
        assert Incident.from_dict(json.loads(json.dumps(incident.to_dict()))) == incident
