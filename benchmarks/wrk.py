"""Load by wrk: one POST body over and over on a number of keep-alive connections, closed loop."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError

_SCRIPT = Path(__file__).with_name("post.lua")


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. `json_bytes`: the length of a binary body's JSON part; 0 for plain JSON."""

    url: str
    body: Path
    json_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WrkResult:
    """One run. Latencies are milliseconds; `errors` counts by kind and leaves out zeros."""

    requests: int
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    errors: Mapping[str, int]

    @property
    def rps(self) -> float:
        """Answered requests per second."""
        return self.requests / self.seconds


def run(load: Load, *, connections: int, seconds: float) -> WrkResult:
    """Send `load` for `seconds`. Raises `BenchmarkError` where wrk is absent or fails.

    One wrk thread: a second one would take a core from the system that is measured. Whether wrk is
    what limits a figure can be seen in its own CPU time, which the results state.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise BenchmarkError("wrk is not installed; Debian and Ubuntu have it as the package wrk")
    content_type = "application/octet-stream" if load.json_bytes else "application/json"
    command = [wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s"]
    command += ["-s", str(_SCRIPT), load.url, "--", str(load.body), content_type]
    command += [str(load.json_bytes)] if load.json_bytes else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds + 120
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"wrk against {load.url} did not end") from error
    if done.returncode:
        raise BenchmarkError(
            f"wrk failed against {load.url}: {(done.stderr or done.stdout).strip()}"
        )
    return parse(done.stdout)


def parse(output: str) -> WrkResult:
    """Read the RESULT line that post.lua prints. Raises `BenchmarkError` where there is none."""
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise BenchmarkError(f"wrk printed no result: {output.strip()!r}")
    raw = json.loads(lines[-1].removeprefix("RESULT "))
    if not raw["requests"]:
        raise BenchmarkError(f"no request was answered; errors: {raw['errors']}")
    return WrkResult(
        requests=raw["requests"],
        seconds=raw["duration_us"] / 1e6,
        p50_ms=raw["p50_us"] / 1e3,
        p90_ms=raw["p90_us"] / 1e3,
        p99_ms=raw["p99_us"] / 1e3,
        max_ms=raw["max_us"] / 1e3,
        errors={kind: count for kind, count in raw["errors"].items() if count},
    )
