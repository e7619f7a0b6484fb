"""How soon the default plan takes a canary back that is worse, and what it served until then."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from benchmarks.rollouts import simulate
from benchmarks.rollouts.cells import Array, Cell, Fault, Plan, default_ramp
from benchmarks.rollouts.simulate import Fired
from benchmarks.rollouts.traffic import shadow_pairs

RATES = (10.0, 200.0, 2000.0)
BASE_ERROR = 0.001
FAULTS: Mapping[str, Fault] = {
    **{f"errors × {x:g}": Fault(errors=x) for x in (2, 5, 10, 50)},
    **{f"latency × {x:g}": Fault(latency=x) for x in (1.1, 1.25, 1.5, 2)},
    **{f"disagreement {x:g} %": Fault(disagreement=x) for x in (3, 5, 10)},
    "errors × 10 from step 3": Fault(errors=10, from_step=2),
    "errors × 50 from step 3": Fault(errors=50, from_step=2),
    "latency × 1.5 from step 3": Fault(latency=1.5, from_step=2),
}


def measure(rollouts: int, seed: int) -> list[dict[str, Any]]:
    """One row a fault and rate; progress goes to stderr."""
    rows = []
    for name, fault in FAULTS.items():
        for rate, replicas in product(RATES, (2, 1)):
            cell = Cell(rate, BASE_ERROR, fault=fault, replicas=replicas)
            plan = default_ramp(rate)
            fired = simulate.run(cell, plan, rollouts, seed)
            row = {
                "fault": name,
                "rate": rate,
                "replicas": replicas,
                "base_error": BASE_ERROR,
                "rollouts": rollouts,
                **summary(fired, plan, cell),
            }
            rows.append(row)
            print(
                f"{name:<26} {rate:>5g}/s × {replicas}  caught {row['caught']:.1%}  "
                f"median {row['delay_s']['median']}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def summary(fired: Fired, plan: Plan, cell: Cell) -> dict[str, Any]:
    """The share that was caught, and quantiles over all rollouts; None where beyond the ramp."""
    onset = plan.starts_s(cell.fault.from_step)
    early = fired.at < onset
    if cell.fault.disagreement > 1:
        # In the shadow: time runs from its first pair, and clients see nothing of it.
        lasts = np.ceil(shadow_pairs(cell, plan.spec)[0])
        return {
            "caught": float((fired.at <= 0).mean()),
            "delay_s": quantiles(np.where(fired.at <= 0, fired.at + lasts, np.inf)),
            "served": quantiles(fired.served),
            "failed": quantiles(fired.failed),
        }
    late = np.where(early, np.inf, fired.at - onset)
    return {
        "caught": float(np.isfinite(late).mean()),
        "delay_s": quantiles(late),
        "served": quantiles(np.where(np.isfinite(late), fired.served, np.inf)),
        "failed": quantiles(np.where(np.isfinite(late), fired.failed, np.inf)),
    }


def quantiles(values: Array) -> dict[str, float | None]:
    """Median and 95th percentile; None where that is infinite."""
    found = {
        "median": np.quantile(values, 0.5, method="higher"),
        "p95": np.quantile(values, 0.95, method="higher"),
    }
    return {name: round(float(v), 1) if np.isfinite(v) else None for name, v in found.items()}
