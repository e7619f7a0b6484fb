"""An open-loop load: requests are due at a steady rate, whether or not earlier ones are answered.

A latency counts from when its request was due, so time in which all clients waited is part of it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

from benchmarks.errors import BenchmarkError

_CONNECT_AGAIN_S = 0.05
_GATEWAY = 8  # characters of a request id that name the gateway which made it up


class Answer(NamedTuple):
    """One request that has ended. Times are Unix seconds.

    `row` is the number of its body. `status` 0: the connection ended without an answer. `gateway`
    and `arm` are as the headers of the answer tell; errors have no arm.
    """

    due: float
    finished: float
    row: int
    status: int
    arm: str
    gateway: str


class OpenLoad:
    """`with OpenLoad(…) as load:` sends `rate` requests a second from a thread of its own.

    Bodies are drawn at random, by `seed`. At most `clients` requests wait at a time. `answers` has
    what has ended so far.
    """

    def __init__(
        self,
        port: int,
        path: str,
        bodies: Sequence[bytes],
        *,
        rate: float,
        clients: int,
        header: str = "",
        seed: int = 0,
    ) -> None:
        self.answers: list[Answer] = []
        self._port = port
        self._requests = [_request(path, body, header) for body in bodies]
        self._rate = rate
        self._clients = clients
        self._rows = np.random.default_rng(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
        """Until so many more requests have ended. Raises `BenchmarkError`."""
        wanted, deadline = len(self.answers) + count, time.monotonic() + timeout_s
        while len(self.answers) < wanted:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{count} requests did not end in {timeout_s:.0f} s")
            time.sleep(0.01)

    async def _run(self) -> None:
        tickets = itertools.count()
        # `unix` and `monotonic` side by side once: a clock that is set must not shift the load.
        began, unix = time.monotonic(), time.time()
        clients = (self._client(tickets, began, unix - began) for _ in range(self._clients))
        await asyncio.gather(*clients)

    async def _client(self, tickets: Iterator[int], began: float, to_unix: float) -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self._stop.is_set():
            due = began + next(tickets) / self._rate
            row = int(self._rows.integers(len(self._requests)))
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            status, arm, gateway = 0, "", ""
            try:
                streams = streams or await asyncio.open_connection("127.0.0.1", self._port)
                status, arm, gateway, closes = await _ask(*streams, self._requests[row])
            except (OSError, EOFError):
                closes = True
            finished = time.monotonic()
            self.answers.append(
                Answer(due + to_unix, finished + to_unix, row, status, arm, gateway)
            )
            if closes and streams is not None:
                streams[1].close()
                streams = None
            if not status:
                await asyncio.sleep(_CONNECT_AGAIN_S)
        if streams is not None:
            streams[1].close()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, str, str, bool]:
    """Status, arm, gateway, and whether the connection closes now."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(header(head, b"content-length")))
    gateway = header(head, b"x-request-id").decode()[:_GATEWAY]
    arm = header(head, b"x-arm").decode()
    return int(head[9:12]), arm, gateway, header(head, b"connection") == b"close"


def header(head: bytes, name: bytes) -> bytes:
    """A header's value in the lower-case head of an answer; empty where it is not there."""
    _, found, rest = head.partition(b"\r\n" + name + b":")
    return rest.partition(b"\r\n")[0].strip() if found else b""


def body(value: float) -> bytes:
    """An infer request of one row that begins with `value`."""
    row = [value, 1.0, 1.0, 1.0]
    tensor = {"name": "x", "shape": [1, len(row)], "datatype": "FP32", "data": row}
    return json.dumps({"inputs": [tensor]}).encode()


def _request(path: str, content: bytes, extra: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{extra}content-length: {len(content)}\r\n\r\n"
    return head.encode() + content
