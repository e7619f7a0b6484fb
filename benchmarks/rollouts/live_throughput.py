"""Throughput while a rollout runs, against the same gateway without one, by turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import models, processes, results, wrk
from benchmarks.errors import BenchmarkError
from benchmarks.rollouts.live_site import PORT, Site

Figures = dict[str, Any]

MODEL: Final = "mlp"
CONNECTIONS: Final = 64
_WARM_UP_S: Final = 2.0
_READY_S: Final = 120.0
# Triggers judge and do not act: on a machine that is busy to the last core a rarely woken canary
# can be slower than its version is, and the rollout must last as long as the measurement.
_HELD: Final = {
    "plan": "fast",
    "shadow": False,
    "steps": [{"weight": 5, "hold": "1h"}],
    "analysis": {"dry_run": True},
}
MODES: Final[Mapping[str, dict[str, Any] | None]] = {
    "none": None,
    "split": {**_HELD, "analysis": {"dry_run": True, "triggers": {"drift": False}}},
    "triggers": _HELD,
    "feedback": {**_HELD, "feedback": {"window": "1m"}},
}
"""Plans by name: no rollout; 5 % without the observer; every default trigger, drift among them, so
the observer reads each answer; and answers kept for labels too."""


def measure(site: Site, scratch: Path, modes: Sequence[str], seconds: int) -> Figures:
    """One round: requests a second in each mode, in this order.

    Beside each rollout, requests that name version 1 in their path are measured, second by second
    in turn: they go where all go without a rollout, so the two meet the same state of the machine.
    """
    body = scratch / "body.json"
    body.write_bytes(models.json_body("x", models.mlp_rows()))
    path = f"http://127.0.0.1:{PORT}/v2/models/{MODEL}"
    loads = [wrk.Load(path + where, body) for where in ("/infer", "/versions/1/infer")]
    return {mode: _mode(site, loads, mode, seconds) for mode in modes}


def _mode(site: Site, loads: Sequence[wrk.Load], mode: str, seconds: int) -> Figures:
    plan = MODES[mode]
    if plan is None:
        site.alone()
        loads = loads[:1]
    else:
        site.start(MODEL, "2", plan)
        site.until(MODEL, "observing", _READY_S)
    wrk.run(loads[0], connections=CONNECTIONS, seconds=_WARM_UP_S)
    # Each in its turn is the first of a pair.
    pairs = [
        {load.url: _second(site, load) for load in (loads if n % 2 else loads[::-1])}
        for n in range(seconds)
    ]
    found = results.median_of([pair[loads[0].url] for pair in pairs])
    found["others_cpu"] = max(one["others_cpu"] for pair in pairs for one in pair.values())
    if plan is not None:
        pinned = loads[1].url
        found["beside"] = [p[loads[0].url]["rps"] / p[pinned]["rps"] for p in pairs]
        found["rollout"] = _ended(site)
    return found


def _second(site: Site, load: wrk.Load) -> Figures:
    with processes.Meter(site.pid) as meter:
        result = wrk.run(load, connections=CONNECTIONS, seconds=1)
    return {
        "rps": result.rps,
        "p50_ms": result.p50_ms,
        "p99_ms": result.p99_ms,
        "errors": sum(result.errors.values()),
        "cpu_us": {role: s * 1e6 / result.requests for role, s in meter.by_role.items()},
        "others_cpu": meter.others,
    }


def _ended(site: Site) -> Figures:
    """Take the rollout back; what it had come to. Raises `BenchmarkError` where it was over."""
    found = site.rollout(MODEL)
    if found["state"] != "observing":
        raise BenchmarkError(f"the rollout was {found['state']} at the end: {found['reason']}")
    site.tell("rollout", "abort", MODEL)
    site.until(MODEL, "rolled_back", _READY_S)
    return {
        "arms": found["arms"],
        "against": [v["sentence"] for v in found["verdicts"] if v["verdict"] == "fail"],
    }


def ratios(rounds: Sequence[Mapping[str, Figures]]) -> dict[str, list[float]]:
    """By mode, each round's throughput against that round's without a rollout."""
    modes = [mode for mode in rounds[0] if mode != "none"] if rounds else []
    return {mode: [r[mode]["rps"] / r["none"]["rps"] for r in rounds] for mode in modes}


def beside(rounds: Sequence[Mapping[str, Figures]]) -> dict[str, list[float]]:
    """By mode, each pair's throughput of the split against that of version 1 by its path."""
    modes = [mode for mode in rounds[0] if mode != "none"] if rounds else []
    return {mode: [ratio for r in rounds for ratio in r[mode]["beside"]] for mode in modes}
