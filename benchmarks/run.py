"""The gateway against a bare ASGI app and plain Ray Serve, on one small model: `make bench`.

Every system runs the same 64-128-10 MLP in ONNX Runtime with one thread and answers the same JSON
request. Only one system is up at a time. A round starts each in turn, checks its answer, warms it
up and measures it at every concurrency; the reported figure is the median over rounds, so that a
slow minute of the machine meets all systems alike.

    python -m benchmarks.run [--rounds 3] [--seconds 5] [--connections 1,16,64] [--systems …]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import deployments, models, processes, results, wrk
from benchmarks.deployments import System
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from benchmarks.results import Target
from models.zoo import catalogue as zoo

CONFIG = ROOT / "benchmarks" / "configs" / "mlp.yaml"
BUSY = 64  # connections at which throughput and CPU time are judged
_WARM_UP_S = 2.0
_QUIET = 0.05  # the share of CPU that other programs may take
_BARE_PORT, _RAY_PORT = 18010, 18020
_RAY_DATA_PATH = ("ServeReplica:", "ProxyActor", "haproxy")
_RAY = {
    "ray-default": "Ray Serve, `@serve.batch`, nothing set",
    "ray-flags": "ray-default with HAProxy and the throughput switch",
    "ray-fastest": "ray-flags, `@serve.batch` as this gateway batches (64 rows, no wait)",
}
# How many times a peer's throughput the gateway must reach.
_FACTORS = {"bare": 2, "ray-default": 150, "ray-flags": 30, "ray-fastest": 30}
SYSTEMS = ("gateway", "bare", *_RAY)

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 where any request failed or any system misbehaved."""
    options = _parse(arguments)
    try:
        return _run(options)
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(SYSTEMS):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: not in {', '.join(SYSTEMS)}"
            )
        return chosen

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load at each concurrency")
    parser.add_argument("--connections", type=numbers, default=[1, 16, 64])
    parser.add_argument("--systems", type=names, default=list(SYSTEMS))
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        scratch = Path(directory)
        model = zoo.build("mlp", scratch / "mlp")
        rows = models.mlp_rows()
        body = scratch / "body.json"
        body.write_bytes(models.json_body("x", rows))
        expected = models.cpu_session(model).run(None, {"x": rows})[0]
        systems = [_system(name, scratch, model) for name in options.systems]
        rounds: dict[str, list[dict[int, Figures]]] = {system.name: [] for system in systems}
        for number in range(1, options.rounds + 1):
            for system in systems:
                measured = dict(_measure(system, body, expected, options))
                rounds[system.name].append(measured)
                for connections, figures in measured.items():
                    print(
                        _progress(number, options.rounds, system.name, connections, figures),
                        flush=True,
                    )
    return _report(systems, rounds, options)


def _system(name: str, scratch: Path, model: Path) -> System:
    if name == "gateway":
        return deployments.gateway(CONFIG, scratch / "home", {"mlp": model})
    if name == "bare":
        command = [sys.executable, "-m", "benchmarks.peers.bare_asgi", str(model), str(_BARE_PORT)]
        url = f"http://127.0.0.1:{_BARE_PORT}/v2/models/mlp/infer"
        return System(name, "one process: uvicorn, an ASGI app and the model", command, url)
    mode = name.removeprefix("ray-")
    command = [sys.executable, "-m", "benchmarks.peers.ray_serve", str(model), str(_RAY_PORT), mode]
    url = f"http://127.0.0.1:{_RAY_PORT}/v2/models/mlp/infer"
    return System(name, _RAY[name], command, url, _RAY_DATA_PATH)


def _measure(
    system: System, body: Path, expected: models.Rows, options: argparse.Namespace
) -> Iterator[tuple[int, Figures]]:
    load = wrk.Load(system.url, body)

    def check() -> None:
        deployments.check_answer(system.url, body.read_bytes(), 0, expected)

    with deployments.started(system, check) as running:
        wrk.run(load, connections=BUSY, seconds=_WARM_UP_S)
        for connections in options.connections:
            with processes.Meter(running.pid) as meter:
                result = wrk.run(load, connections=connections, seconds=options.seconds)
            yield connections, _figures(system, result, meter)


def _figures(system: System, result: wrk.WrkResult, meter: processes.Meter) -> Figures:
    micros = {role: s * 1e6 / result.requests for role, s in meter.by_role.items()}
    path = (us for role, us in micros.items() if processes.on_data_path(role, system.data_path))
    return {
        "requests": result.requests,
        "rps": result.rps,
        "p50_ms": result.p50_ms,
        "p90_ms": result.p90_ms,
        "p99_ms": result.p99_ms,
        "errors": dict(result.errors),
        "cpu_us": {"data_path": sum(path), "all": sum(micros.values()), "by_role": micros},
        "wrk_cpu_us": meter.load * 1e6 / result.requests,
        "others_cpu": meter.others,
    }


def _progress(number: int, rounds: int, name: str, connections: int, figures: Figures) -> str:
    text = (
        f"round {number}/{rounds}  {name:<12} c={connections:<3} {figures['rps']:>9,.0f} rps  "
        f"p50 {figures['p50_ms']:.2f} ms  p99 {figures['p99_ms']:.2f} ms  "
        f"CPU {figures['cpu_us']['all']:,.0f} µs"
    )
    return text + (f"  ERRORS {figures['errors']}" if figures["errors"] else "")


def _report(
    systems: Sequence[System],
    rounds: Mapping[str, Sequence[Mapping[int, Figures]]],
    options: argparse.Namespace,
) -> int:
    summary = {
        name: {c: results.median_of([r[c] for r in each]) for c in options.connections}
        for name, each in rounds.items()
    }
    targets = list(_targets(summary))
    measured = [figures for each in rounds.values() for by_c in each for figures in by_c.values()]
    failed = sum(sum(figures["errors"].values()) for figures in measured)
    others = max(figures["others_cpu"] for figures in measured)
    text = "\n\n".join(
        [
            _table(summary, rounds, options.connections),
            "\n".join(f"- **{system.name}**: {system.description}" for system in systems),
            results.targets_table(targets),
            f"Failed requests: {failed}. Other programs took at most {others:.0%} of the machine's "
            "CPU during a measurement.",
        ]
    )
    settings = {"rounds": options.rounds, "seconds": options.seconds, "warm_up_s": _WARM_UP_S}
    path = results.write(
        "mlp", {"settings": settings, "summary": summary, "rounds": rounds}, targets, text
    )
    print(f"\n{text}\n\nwritten to {path}")
    if others > _QUIET:
        print("bench: the machine was not quiet; measure again", file=sys.stderr)
    return 1 if failed else 0


def _table(
    summary: Mapping[str, Mapping[int, Figures]],
    rounds: Mapping[str, Sequence[Mapping[int, Figures]]],
    connections: Sequence[int],
) -> str:
    head = [
        "system",
        "c",
        "rps",
        "rps spread",
        "p50 ms",
        "p99 ms",
        "CPU µs path",
        "CPU µs all",
        "wrk µs",
    ]
    rows = []
    for name, by_connections in summary.items():
        for c in connections:
            figures = by_connections[c]
            rps = [each[c]["rps"] for each in rounds[name]]
            rows.append(
                [
                    name,
                    str(c),
                    results.number(figures["rps"]),
                    f"±{(max(rps) - min(rps)) / 2 / statistics.median(rps):.0%}",
                    results.number(figures["p50_ms"]),
                    results.number(figures["p99_ms"]),
                    results.number(figures["cpu_us"]["data_path"]),
                    results.number(figures["cpu_us"]["all"]),
                    results.number(figures["wrk_cpu_us"]),
                ]
            )
    return results.table(head, rows)


def _targets(summary: Mapping[str, Mapping[int, Figures]]) -> Iterator[Target]:
    """What the gateway must reach, where the systems and concurrencies it needs were measured."""
    if "gateway" not in summary:
        return
    ours = summary["gateway"]
    if BUSY in ours:
        for peer, factor in _FACTORS.items():
            if peer in summary:
                ratio = ours[BUSY]["rps"] / summary[peer][BUSY]["rps"]
                yield Target(f"throughput against {peer}, c={BUSY}", ratio, factor, True, "×")
        cpu = ours[BUSY]["cpu_us"]["all"]
        yield Target(f"CPU per request, all processes, c={BUSY}", cpu, 45, False, "µs")
    if 1 in ours and "bare" in summary:
        ratio = ours[1]["p50_ms"] / summary["bare"][1]["p50_ms"]
        yield Target("p50 against bare, c=1", ratio, 2, False, "×")


if __name__ == "__main__":
    sys.exit(main())
