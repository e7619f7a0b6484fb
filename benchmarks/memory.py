"""Memory of the idle deployment, and whether it grows over 200,000 requests.

python -m benchmarks.memory [--requests 200000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import deployments, models, processes, results, wrk
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from benchmarks.processes import ProcessUsage
from benchmarks.results import Target
from models.zoo import catalogue as zoo

CONFIG = ROOT / "benchmarks" / "configs" / "mlp.yaml"
_CONNECTIONS = 64
_WARM_UP_REQUESTS = 20_000
_BURST_S = 5.0
_SETTLE_S = 10.0
# Ours; the rest of the tree is Ray's, and named in the table.
_OURS = ("ServeReplica:gateway:", "ServeReplica:controller:", "ServeReplica:model-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 where any request failed or the gateway misbehaved."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            return _run(Path(directory), options.requests)
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130


def _run(scratch: Path, requests: int) -> int:
    model = zoo.build("mlp", scratch / "mlp")
    rows = models.mlp_rows()
    body = scratch / "body.json"
    body.write_bytes(models.json_body("x", rows))
    expected = models.cpu_session(model).run(None, {"x": rows})[0]
    system = deployments.gateway(CONFIG, scratch / "home", {"mlp": model})
    load = wrk.Load(system.url, body)

    def check() -> None:
        deployments.check_answer(system.url, body.read_bytes(), 0, expected)

    with deployments.started(system, check) as running:
        idle = _settled(running.pid)
        print("idle", flush=True)
        failed = _send(load, _WARM_UP_REQUESTS)
        warm = _settled(running.pid)
        failed += _send(load, requests)
        after = _settled(running.pid)
    return _report(idle, warm, after, requests, failed)


def _settled(pid: int) -> Sequence[ProcessUsage]:
    """Memory once the deployment has been idle for a while."""
    time.sleep(_SETTLE_S)
    return processes.usage(pid, memory=True)


def _send(load: wrk.Load, requests: int) -> int:
    """At least `requests` requests, in bursts; how many failed."""
    sent = failed = 0
    while sent < requests:
        result = wrk.run(load, connections=_CONNECTIONS, seconds=_BURST_S)
        sent += result.requests
        failed += sum(result.errors.values())
        print(f"{sent:,} of {requests:,} requests", flush=True)
    return failed


def _report(
    idle: Sequence[ProcessUsage],
    warm: Sequence[ProcessUsage],
    after: Sequence[ProcessUsage],
    requests: int,
    failed: int,
) -> int:
    targets, rows = [], []
    warmed, final = ({p.pid: p for p in reading} for reading in (warm, after))
    for process in sorted(idle, key=lambda p: (not p.role.startswith(_OURS), -p.rss)):
        if process.pid not in warmed or process.pid not in final:
            continue  # a helper of Ray's that ended by itself
        growth = final[process.pid].rss / warmed[process.pid].rss - 1
        sizes = (process.rss, process.pss, warmed[process.pid].rss, final[process.pid].rss)
        rows.append([process.role, *(f"{size / 2**20:.0f}" for size in sizes), f"{growth:+.1%}"])
        if process.role.startswith(_OURS):
            name = f"growth of {process.role} over {requests:,} requests"
            targets.append(Target(name, growth * 100, 5, False, "%"))
    if len(targets) < len(_OURS):
        raise BenchmarkError("a process of the deployment was replaced while it was measured")
    head = ["process", "idle RSS MiB", "idle PSS MiB", "warm RSS", "RSS after", "growth"]
    text = "\n\n".join(
        [
            results.table(head, rows),
            results.targets_table(targets),
            f"Warm: after {_WARM_UP_REQUESTS:,} requests. Failed requests: {failed}.",
        ]
    )
    body = {
        "settings": {"requests": requests, "warm_up_requests": _WARM_UP_REQUESTS},
        "processes": [dict(zip(head, row, strict=True)) for row in rows],
    }
    path = results.write("memory", body, targets, text)
    print(f"\n{text}\n\nwritten to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
