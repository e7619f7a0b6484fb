"""Random instances of the placement problem, and the optimum of small ones by a solver."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from serving.core.placement import Demand, Device, Placement, free_bytes

GIB = 1 << 30
MEMORY = {"L4": 24, "A10G": 24, "A100": 80, "H100": 80, "MIG 1g.10gb": 10, "MIG 3g.40gb": 40}


@dataclass(frozen=True)
class Score:
    """What a placement is judged by, the more important first; less is better."""

    left_out: int
    throttled: int
    crowded: int
    gpus: int


def random_devices(rng: random.Random, count: int) -> list[Device]:
    devices = []
    for i in range(count):
        kind = rng.choice(list(MEMORY))
        total = MEMORY[kind] * GIB
        others = rng.choice((0, 0, 0, rng.randrange(total)))
        devices.append(
            Device(
                uuid=f"{'MIG' if 'MIG' in kind else 'GPU'}-{i:04d}",
                node=f"node-{i // 8}",
                type=kind,
                memory_bytes=total,
                used_by_others=others,
                cordoned=rng.random() < 0.1,
                throttled=rng.random() < 0.15,
                mig="MIG" in kind,
            )
        )
    return devices


def random_demands(
    rng: random.Random, devices: Sequence[Device], apps: int, most: int, largest: float = 30.0
) -> list[Demand]:
    """Up to `most` replicas each; some hold GPUs already, never more than these have room for."""
    demands: list[Demand] = []
    for i in range(apps):
        size = int(rng.uniform(0.2, rng.choice((4.0, largest))) * GIB)
        replicas = rng.randint(1, most)
        types = rng.choice((None, None, None, rng.sample(list(MEMORY), 3)))
        free = free_bytes(devices, demands)
        kept: list[str] = []
        for device in rng.sample(list(devices), min(len(devices), rng.choice((0, 0, 1, 2)))):
            if len(kept) < replicas and free[device.uuid] >= size:
                kept.append(device.uuid)
        demands.append(
            Demand(
                app=f"app-{i}",
                model=f"model-{i // 2}",
                version=str(i % 2 + 1),
                replicas=replicas,
                bytes=size,
                group=f"rollout-{i // 2}" if rng.random() < 0.5 else "",
                kept=tuple(kept),
                device_types=None if types is None else frozenset(types),
            )
        )
    return demands


def score(devices: Sequence[Device], demands: Sequence[Demand], placed: Placement) -> Score:
    throttled = {d.uuid for d in devices if d.throttled}
    known = {d.uuid for d in devices}
    teams: Counter[tuple[str, str]] = Counter()
    slow = 0
    for demand in demands:
        slots = placed.slots[demand.app]
        teams.update((demand.group or f"app {demand.app}", uuid) for uuid in slots)
        slow += sum(uuid in throttled for uuid in slots[len(demand.kept) :])
    used = {uuid for slots in placed.slots.values() for uuid in slots if uuid in known}
    return Score(len(placed.refused), slow, sum(n - 1 for n in teams.values()), len(used))


def optimum(devices: Sequence[Device], demands: Sequence[Demand]) -> Score:
    """The best score there is, by mixed-integer programming.

    Variables: x[d, g] new replicas of d on g; y[d] d is placed whole; u[g] g is in use; e[t, g]
    members of team t on g beyond the first.
    """
    free = free_bytes(devices, demands)
    teams = sorted({d.group or f"app {d.app}" for d in demands})
    held = Counter((d.group or f"app {d.app}", uuid) for d in demands for uuid in d.kept)
    nd, ng, nt = len(demands), len(devices), len(teams)
    x = np.arange(nd * ng).reshape(nd, ng)
    y = nd * ng + np.arange(nd)
    u = y[-1] + 1 + np.arange(ng)
    e = u[-1] + 1 + np.arange(nt * ng).reshape(nt, ng)
    n = int(e[-1, -1]) + 1
    lower, upper = np.zeros(n), np.ones(n)
    upper[e.ravel()] = np.inf
    rows, low, high = [], [], []

    def constrain(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(n)
        for variable, factor in terms.items():
            row[variable] += factor
        rows.append(row)
        low.append(least)
        high.append(most)

    for i, demand in enumerate(demands):
        constrain({**{int(v): 1.0 for v in x[i]}, int(y[i]): -float(demand.missing)}, 0, 0)
        for j, device in enumerate(devices):
            types = demand.device_types
            fits = not device.cordoned and (types is None or device.type in types)
            upper[x[i, j]] = demand.missing if fits else 0
            constrain({int(x[i, j]): 1.0, int(u[j]): -float(demand.missing)}, -np.inf, 0)
    for j, device in enumerate(devices):
        mib = {int(x[i, j]): demand.bytes / GIB for i, demand in enumerate(demands)}
        constrain(mib, 0, max(0, free[device.uuid]) / GIB)
        if any(device.uuid in d.kept for d in demands):
            lower[u[j]] = 1
        for t, team in enumerate(teams):
            members = {
                int(x[i, j]): 1.0
                for i, d in enumerate(demands)
                if (d.group or f"app {d.app}") == team
            }
            constrain({**members, int(e[t, j]): -1.0}, -np.inf, 1 - held[team, device.uuid])
    replicas = sum(d.replicas for d in demands)
    crowd = ng + 1.0
    slow = crowd * (replicas + 1)
    cost = np.zeros(n)
    cost[u] = 1
    cost[e.ravel()] = crowd
    for j, device in enumerate(devices):
        cost[x[:, j]] = slow if device.throttled else 0
    cost[y] = -slow * (replicas + 1)
    found = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), np.array(low), np.array(high)),
        bounds=Bounds(lower, upper),
        integrality=np.ones(n),
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    v = np.rint(found.x)
    return Score(
        left_out=nd - int(v[y].sum()),
        throttled=int(sum(v[x[:, j]].sum() for j, d in enumerate(devices) if d.throttled)),
        crowded=int(v[e.ravel()].sum()),
        gpus=int(v[u].sum()),
    )
