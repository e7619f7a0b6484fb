"""How often a canary that is no worse is taken back, by any trigger, in every cell of traffic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import beta

from benchmarks.rollouts import draws, simulate
from benchmarks.rollouts.cells import BASE_ERRORS, BUSY_RATES, RATES, SCENARIOS, Cell, default_ramp

ALLOWED = 0.01


def cells() -> list[Cell]:
    """All of them."""
    return [
        Cell(rate, base_error, scenario)
        for scenario in SCENARIOS
        if scenario != "day"  # the same, seventy times slower
        for rate in (BUSY_RATES if scenario in draws.PARTS else RATES)
        for base_error in BASE_ERRORS
    ]


def measure(chosen: Sequence[Cell], rollouts: int, seed: int) -> list[dict[str, Any]]:
    """One row a cell; progress goes to stderr."""
    rows = []
    for cell in chosen:
        plan = default_ramp(cell.rate)
        fired = simulate.run(cell, plan, rollouts, seed)
        hit = np.isfinite(fired.at)
        false = int(hit.sum())
        row = {
            "cell": cell.name,
            "scenario": cell.scenario,
            "rate": cell.rate,
            "base_error": cell.base_error,
            "rollouts": rollouts,
            "ramp_s": sum(plan.lengths_s),
            "false": false,
            "upper": upper_bound(false, rollouts),
            "by_trigger": {
                name: int((fired.trigger[hit] == i).sum()) for i, name in enumerate(fired.triggers)
            },
        }
        rows.append(row)
        print(
            f"{cell.name:<26} {false:>5} of {rollouts}  ≤ {row['upper']:.2%}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def upper_bound(k: int, n: int) -> float:
    """The upper end of the Clopper-Pearson interval of 95 % for `k` of `n`."""
    return 1.0 if k == n else float(beta.ppf(0.975, k + 1, n - k))
