"""One live rollout at a time: start it under load, follow it to its end, say what clients saw."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.errors import BenchmarkError
from benchmarks.rollouts import live_models
from benchmarks.rollouts.live_load import Answer, OpenLoad, body
from benchmarks.rollouts.live_site import PORT, Site

Figures = dict[str, Any]

CANARY: Final = "canary"
# No version fails it.
_PROBE_VALUE: Final = 2.0
_PROBE_HEADER: Final = "x-probe"
# Of the probes' connections each gateway gets one: the kernel deals them out by chance.
_PROBES: Final = 16
_WARM_UP_S: Final = 3.0
_AFTER_S: Final = 1.5


def plan(*weights: float, hold: str = "10m", bake: str = "3s") -> dict[str, Any]:
    """The plan `fast` without copies, with these steps; every trigger as it is by default.

    Requests with the probes' header go to the canary as long as it has weight.
    """
    return {
        "plan": "fast",
        "shadow": False,
        "steps": [{"weight": weight, "hold": hold} for weight in weights],
        "bake": {"duration": bake},
        "assignment": {"overrides": [{"header": _PROBE_HEADER, "value": CANARY, "to": CANARY}]},
    }


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is rolled out, how, and what must come of it. Rates are requests a second.

    `fails_below`: the canary fails bodies whose first value is less. `probes`: how many requests a
    second ask whether the canary has weight.
    """

    name: str
    about: str
    model: str
    version: str
    fails_below: float
    plan: Mapping[str, Any]
    ends: str
    rate: float = 200.0
    clients: int = 20
    probes: float = 50.0
    gateways: int = 1
    timeout_s: float = 120.0


SCENARIOS: Final = (
    Scenario(
        "failing",
        "fails 5 % of requests, 5 % weight",
        "double",
        "3",
        0.05,
        plan(5),
        "rolled_back",
    ),
    Scenario(
        "all-failing",
        "fails every request, 5 % weight",
        "double",
        "4",
        1.0,
        plan(5),
        "rolled_back",
    ),
    Scenario(
        "healthy",
        "is as good as stable; 5 %, 25 % and 50 % for 6 s each, bake of 6 s",
        "double",
        "2",
        0.0,
        plan(5, 25, 50, hold="6s", bake="6s"),
        "succeeded",
    ),
    Scenario(
        "slower",
        "takes 1.5 times as long, 50 % weight",
        "steady",
        "2",
        0.0,
        plan(50),
        "rolled_back",
        rate=50.0,
        probes=5.0,
        timeout_s=300.0,
    ),
    Scenario(
        "latency",
        "fails 5 % of requests, 50 % weight, two gateways",
        "double",
        "3",
        0.05,
        plan(50),
        "rolled_back",
        probes=400.0,
        gateways=2,
    ),
)


def measure(site: Site, scenario: Scenario, seed: int) -> Figures:
    """One rollout of the scenario. Raises `BenchmarkError` where it comes to no end."""
    site.alone()
    path = f"/v2/models/{scenario.model}/infer"
    bodies = [body(float(value)) for value in live_models.first_values()]
    load = OpenLoad(PORT, path, bodies, rate=scenario.rate, clients=scenario.clients, seed=seed)
    probes = OpenLoad(
        PORT,
        path,
        [body(_PROBE_VALUE)],
        rate=scenario.probes,
        clients=_PROBES,
        header=f"{_PROBE_HEADER}: {CANARY}\r\n",
    )
    with load, probes:
        load.wait_for(round(_WARM_UP_S * scenario.rate))
        rollout = site.start(scenario.model, scenario.version, scenario.plan)
        ended = site.follow(scenario.model, scenario.ends, scenario.timeout_s)
        load.wait_for(round(_AFTER_S * scenario.rate))
        if ended["state"] not in (scenario.ends, "rolled_back"):
            site.tell("rollout", "abort", scenario.model)
        elif ended["state"] == "succeeded":
            site.tell("rollback", scenario.model, "--reason", "the next run begins with version 1")
        if ended["state"] != "rolled_back":
            site.until(rollout, "rolled_back", scenario.timeout_s)
    entered = site.entered(rollout)
    if "observing" not in entered:
        raise BenchmarkError(f"{rollout} never had weight: {ended['reason']}")
    return {
        "state": ended["state"],
        "reason": ended["reason"],
        # How long it took to end otherwise is no figure.
        **(_spans(probes.answers, entered, scenario) if ended["state"] == scenario.ends else {}),
        **seen(load.answers, scenario.fails_below, entered["observing"]),
        "probes_failed": sum(answer.status != 200 for answer in probes.answers),
        "arms": ended["arms"],
    }


def _spans(probes: Sequence[Answer], entered: Mapping[str, float], scenario: Scenario) -> Figures:
    if scenario.ends == "succeeded":
        return {"rollout_s": entered["succeeded"] - entered["observing"]}
    weight = weighted(probes)
    if len(weight) != scenario.gateways:
        raise BenchmarkError(f"probes reached {len(weight)} of {scenario.gateways} gateways")
    return spans(weight, entered["rolling_back"])


def weighted(probes: Iterable[Answer]) -> dict[str, tuple[float, float]]:
    """By gateway, from when to when the canary had weight in its route table.

    From the first answer of the canary to a probe, to the first answer that was stable's again: no
    earlier than it was so. Gateways at which the canary never had any are left out.
    """
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    for answer in sorted(probes, key=lambda a: a.finished):
        if answer.arm == CANARY:
            began.setdefault(answer.gateway, answer.finished)
            ended.pop(answer.gateway, None)
        elif answer.arm and answer.gateway in began:
            ended.setdefault(answer.gateway, answer.finished)
    return {
        gateway: (since, ended[gateway]) for gateway, since in began.items() if gateway in ended
    }


def spans(weight: Mapping[str, tuple[float, float]], verdict: float) -> Figures:
    """How long the canary had weight anywhere, and what followed its verdict, by gateway."""
    first = min(since for since, _ in weight.values())
    last = max(until for _, until in weight.values())
    return {
        "weight_s": last - first,
        "verdict_s": verdict - first,
        "zero_ms": (last - verdict) * 1e3,
        "zero_ms_by_gateway": {g: (until - verdict) * 1e3 for g, (_, until) in weight.items()},
    }


def seen(answers: Sequence[Answer], fails_below: float, since: float) -> Figures:
    """What the load's clients saw of the rollout: requests that were due from `since` on.

    Failures are put down to the version that fails such a body by itself; `neither` should be
    empty, and `lost` counts connections that ended without an answer.
    """
    during = [answer for answer in answers if answer.due >= since]
    failed = [a for a in during if a.status != 200]
    lost = sum(a.status == 0 for a in failed)
    blamed = Counter(live_models.blame(a.row, fails_below) for a in failed if a.status)
    latencies = sorted(a.finished - a.due for a in during) or [0.0]
    return {
        "requests": len(during),
        "canary_answers": sum(a.arm == CANARY for a in during),
        "failed": {arm: blamed[arm] for arm in (CANARY, "stable", "neither")} | {"lost": lost},
        "p50_ms": statistics.median(latencies) * 1e3,
        "p99_ms": latencies[int(0.99 * (len(latencies) - 1))] * 1e3,
        "max_ms": latencies[-1] * 1e3,
    }
