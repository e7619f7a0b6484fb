"""Clients that post one body over and over, a closed loop each, spread over processes.

    python -m benchmarks.gpu.load URL BODY JSON_BYTES CONNECTIONS SECONDS

is one process of them; it prints its latencies (ms) and the seconds that it took as JSON. Python's
lock would make one process the slowest part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.client import Client
from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from benchmarks.wrk import Load

_PER_PROCESS = 4


def measure(load: Load, connections: int, seconds: float) -> Mapping[str, float]:
    """{"requests_per_s", "p50_ms", "p99_ms"}. Raises `BenchmarkError` if any request failed."""
    count = max(1, min((os.cpu_count() or 1) // 2, -(-connections // _PER_PROCESS)))
    shares = [connections // count + (i < connections % count) for i in range(count)]
    command = [sys.executable, "-m", "benchmarks.gpu.load", load.url, str(load.body)]
    clients = [
        subprocess.Popen(
            [*command, str(load.json_bytes), str(share), str(seconds)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in shares
    ]
    rate, latencies = 0.0, []
    for client in clients:
        out, errors = client.communicate(timeout=seconds + 120)
        if client.returncode:
            raise BenchmarkError((errors.strip().splitlines() or ["a client failed"])[-1])
        told = json.loads(out)
        rate += len(told["latencies_ms"]) / told["seconds"]
        latencies += told["latencies_ms"]
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"requests_per_s": rate, "p50_ms": float(p50), "p99_ms": float(p99)}


def main(url: str, body: str, json_bytes: str, connections: str, seconds: str) -> int:
    """One process of clients."""
    load = Load(url, Path(body), int(json_bytes))
    limit_s = float(seconds)

    def post_on(client: Client, started: float) -> list[float]:
        latencies: list[float] = []
        while time.perf_counter() - started < limit_s or not latencies:
            latencies.append(client.post().latency_ms)
        return latencies

    try:
        clients = [Client(load) for _ in range(int(connections))]
        started = time.perf_counter()
        with ThreadPoolExecutor(len(clients)) as pool:
            results = pool.map(lambda client: post_on(client, started), clients)
            latencies = [ms for each in results for ms in each]
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"latencies_ms": latencies, "seconds": time.perf_counter() - started}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
