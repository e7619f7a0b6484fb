"""What accounting for every request costs: throughput with it and without it.

Second by second in turn. Two models of one file on one gateway; for one of them the gateway neither
counts device time nor works out a price (`benchmarks/unaccounted`). So both meet the same process
and the same moment.

python -m benchmarks.accounting [--pairs 40]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks import deployments, models, processes, results, wrk
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from benchmarks.results import Target
from models.zoo import catalogue as zoo

CONFIG: Final = ROOT / "benchmarks" / "configs" / "mlp.yaml"
COUNTED, FREE = "mlp", "free"
_UNACCOUNTED: Final = ROOT / "benchmarks" / "unaccounted"
_CONNECTIONS: Final = 64
_WARM_UP_S: Final = 3.0

Second = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where any request failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accounting", description=__doc__)
    parser.add_argument(
        "--pairs", type=int, default=40, help="of seconds, one with and one without"
    )
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            return _report(_measure(Path(directory), options.pairs))
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130


def _measure(scratch: Path, pairs: int) -> list[dict[str, Second]]:
    model = zoo.build("mlp", scratch / "mlp")
    rows = models.mlp_rows()
    body = scratch / "body.json"
    body.write_bytes(models.json_body("x", rows))
    expected = models.cpu_session(model).run(None, {"x": rows})[0]
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["models"] = dict.fromkeys((COUNTED, FREE), config["models"]["mlp"])
    file = scratch / "serving.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(_UNACCOUNTED), os.environ.get("PYTHONPATH")]))
    system = deployments.gateway(file, scratch / "home", {COUNTED: model, FREE: model})
    system = dataclasses.replace(system, environment={**system.environment, "PYTHONPATH": path})
    loads = {name: wrk.Load(deployments.infer_url(file, name), body) for name in (COUNTED, FREE)}

    def check() -> None:
        for load in loads.values():
            deployments.check_answer(load.url, body.read_bytes(), 0, expected)

    with deployments.started(system, check) as running:
        if [_cost(load) == "0" for load in loads.values()] != [False, True]:
            raise BenchmarkError("accounting is not on for one model and off for the other")
        for load in loads.values():
            wrk.run(load, connections=_CONNECTIONS, seconds=_WARM_UP_S)
        found = []
        for number in range(pairs):
            # Each in its turn is the first.
            order = (COUNTED, FREE) if number % 2 else (FREE, COUNTED)
            found.append({name: _second(loads[name], running.pid) for name in order})
            print(f"pair {number + 1} of {pairs}: {_ratio(found[-1]):.3f}", flush=True)
        return found


def _cost(load: wrk.Load) -> str | None:
    request = urllib.request.Request(load.url, data=load.body.read_bytes())
    with urllib.request.urlopen(request, timeout=10) as reply:
        cost: str | None = reply.headers.get("x-inference-cost-usd")
        return cost


def _second(load: wrk.Load, pid: int) -> Second:
    with processes.Meter(pid) as meter:
        result = wrk.run(load, connections=_CONNECTIONS, seconds=1)
    gateway = sum(s for role, s in meter.by_role.items() if role.startswith("ServeReplica:gateway"))
    return {
        "rps": result.rps,
        "gateway_us": gateway * 1e6 / result.requests,
        "errors": sum(result.errors.values()),
        "others_cpu": meter.others,
    }


def _ratio(pair: dict[str, Second]) -> float:
    return float(pair[COUNTED]["rps"] / pair[FREE]["rps"])


def _report(pairs: Sequence[dict[str, Second]]) -> int:
    ratios = sorted(map(_ratio, pairs))
    failed = sum(second["errors"] for pair in pairs for second in pair.values())
    others = max(second["others_cpu"] for pair in pairs for second in pair.values())
    target = Target(
        "throughput with accounting against without", statistics.median(ratios), 0.98, True, "×"
    )
    rows = [
        [
            what,
            *(
                results.number(statistics.median(pair[name][key] for pair in pairs))
                for key in ("rps", "gateway_us")
            ),
        ]
        for name, what in ((COUNTED, "with accounting"), (FREE, "without"))
    ]
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    text = "\n\n".join(
        [
            results.table(["MLP, c=64", "rps", "gateway CPU µs"], rows),
            results.targets_table([target]),
            f"Median of {len(pairs)} pairs of seconds; the middle half is {low:.3f} to {high:.3f}. "
            f"Failed requests: {failed}. Other programs took at most {others:.0%} of the CPU.",
        ]
    )
    path = results.write("accounting", {"pairs": list(pairs)}, [target], text)
    print(f"\n{text}\n\nwritten to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
