"""One connection that posts one body, one request at a time, and reads what the run alone took."""

from __future__ import annotations

import http.client
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from benchmarks.errors import BenchmarkError
from benchmarks.wrk import Load

_COMPUTE = re.compile(r"compute;dur=([\d.]+)")
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


@dataclass(frozen=True, slots=True)
class Answer:
    """Milliseconds from the first byte sent to the last received, and of the model's run in it."""

    latency_ms: float
    run_ms: float


class Client:
    """A keep-alive connection. Raises `BenchmarkError` where it cannot be had.

    `congestion`: its TCP congestion control, None for the system's.
    """

    def __init__(self, load: Load, congestion: str | None = None) -> None:
        parts = urlsplit(load.url)
        self._path = parts.path
        self._body = load.body.read_bytes()
        self._headers = {"Content-Type": "application/json"}
        if load.json_bytes:
            self._headers = {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(load.json_bytes),
            }
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            self._http.connect()
            if congestion is not None:
                option = socket.IPPROTO_TCP, socket.TCP_CONGESTION
                self._http.sock.setsockopt(*option, congestion.encode())
        except OSError as error:
            raise BenchmarkError(f"cannot connect to {load.url}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def post(self) -> Answer:
        """Send the body and read the answer. Raises `BenchmarkError` where that is not a 200."""
        started = time.perf_counter()
        try:
            self._http.request("POST", self._path, self._body, self._headers)
            reply = self._http.getresponse()
            content = reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise BenchmarkError(f"{self._path}: no answer: {error!r}") from error
        latency = time.perf_counter() - started
        timing = _COMPUTE.search(reply.headers.get("Server-Timing", ""))
        if reply.status != 200 or timing is None:
            raise BenchmarkError(f"{self._path} answers {reply.status}: {content[:200]!r}")
        return Answer(latency * 1e3, float(timing[1]))


def system_congestion() -> str:
    """The congestion control that the system gives to TCP connections."""
    return _CONGESTION.read_text(encoding="ascii").strip()
