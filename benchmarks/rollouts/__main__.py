"""Simulate rollouts and write what came of them to `benchmarks/rollouts/results/`.

python -m benchmarks.rollouts [--rollouts N] [--cells batches/200/0.005,sticky/*]
                              [--only false-rollbacks,bakes,detection,peers] [--seed 1]

Each row of a result is made of N rollouts; without --rollouts it is as many as its part needs.
With --cells other rows stay as a run before left them: false rollbacks by cell, bakes by traffic.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.rollouts import bakes, comparison, detection, false_rollbacks, plots, report
from benchmarks.rollouts.cells import Cell

RESULTS = Path(__file__).parent / "results"
PARTS = {"false-rollbacks": 10_000, "bakes": 1000, "detection": 1000, "peers": 1000}
"""How many rollouts a row of each is made of, where nobody says.

Tenths of a percent need many; delays, and differences in percent, fewer.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 where a cell has more false rollbacks than are allowed."""
    options = _parse(arguments)
    RESULTS.mkdir(exist_ok=True)
    count = {part: options.rollouts or usual for part, usual in PARTS.items()}
    some = len(options.cells) < len(false_rollbacks.cells())
    missed = 0
    if "false-rollbacks" in options.only:
        rows = _measured(
            "false-rollbacks",
            count,
            lambda rollouts: false_rollbacks.measure(options.cells, rollouts, options.seed),
            keep=some,
        )
        plots.false_rollbacks(rows, RESULTS)
        missed = sum(row["upper"] > false_rollbacks.ALLOWED for row in rows)
    if "bakes" in options.only:
        scenarios = {cell.scenario for cell in options.cells} if some else set(bakes.SCENARIOS)
        _measured(
            "bakes",
            count,
            lambda rollouts: bakes.measure(scenarios, rollouts, options.seed),
            keep=some,
        )
    if "detection" in options.only:
        rows = _measured(
            "detection", count, lambda rollouts: detection.measure(rollouts, options.seed)
        )
        plots.detection(rows, RESULTS)
    if "peers" in options.only:
        rows = _measured(
            "peers", count, lambda rollouts: comparison.measure(rollouts, options.seed)
        )
        plots.peers(rows, RESULTS)
    print(f"{missed} cells have more than {false_rollbacks.ALLOWED:.0%} false rollbacks")
    return 1 if missed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    every = false_rollbacks.cells()

    def cells(text: str) -> list[Cell]:
        found = []
        for pattern in text.split(","):
            matching = [cell for cell in every if fnmatch(cell.name, pattern)]
            if not matching:
                raise argparse.ArgumentTypeError(
                    f"{pattern}: no such cell; they are named as {every[0].name}"
                )
            found += [cell for cell in matching if cell not in found]
        return found

    def parts(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(PARTS):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: not in {', '.join(PARTS)}"
            )
        return chosen

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is allowed")
        return int(text)

    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts", description=__doc__)
    usual = ", ".join(f"{n:,} of {part}" for part, n in PARTS.items())
    parser.add_argument("--rollouts", type=positive, help=f"a row; usually {usual}")
    parser.add_argument("--cells", type=cells, default=every, help="names with * and ?")
    parser.add_argument("--only", type=parts, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def _measured(
    name: str,
    count: Mapping[str, int],
    measure: Callable[[int], list[dict[str, Any]]],
    *,
    keep: bool = False,
) -> list[dict[str, Any]]:
    begin = time.process_time()
    rows = measure(count[name])
    described = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": machine.cpu_model(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in ("numpy", "scipy")},
        "commit": machine.commit(),
        "command": " ".join(["python -m benchmarks.rollouts", *sys.argv[1:]]),
        "rollouts": count[name],
        "cpu_seconds": round(time.process_time() - begin),
    }
    if keep:
        rows = report.with_kept(name, described, rows, RESULTS)
    report.write(name, described, rows, RESULTS)
    return rows


if __name__ == "__main__":
    sys.exit(main())
