"""A steady load over keep-alive connections, in a thread of its own, that forgets no answer."""

from __future__ import annotations

import asyncio
import collections
import json
import math
import threading
import time
from collections.abc import Sequence
from typing import Any


class Load:
    """`connections` clients, each posting its next request when the last is answered.

    `answers` counts (status, version); `broken` lists connections that ended without an answer;
    `wrong` lists answers that differ from the first of the same body and version, beyond the last
    digits, which depend on the batch.
    """

    def __init__(
        self,
        port: int,
        path: str,
        bodies: Sequence[dict[str, Any]],
        *,
        connections: int = 8,
        pause_s: float = 0.0,
        headers: str = "",
    ) -> None:
        self.answers: collections.Counter[tuple[int, str]] = collections.Counter()
        self.broken: list[str] = []
        self.wrong: list[tuple[list[float], list[float]]] = []
        self.failures: list[tuple[int, bytes]] = []
        self.slowest_s = 0.0
        self._port = port
        self._requests = [_request(path, body, headers) for body in bodies]
        self._connections = connections
        self._pause_s = pause_s
        self._first: dict[tuple[int, str], list[float]] = {}
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def count(self) -> int:
        return sum(self.answers.values()) + len(self.broken)

    @property
    def failed(self) -> dict[tuple[int, str], int]:
        return {k: n for k, n in self.answers.items() if k[0] != 200}

    def wait_for(self, count: int, timeout_s: float = 120.0) -> None:
        """Until `count` requests have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, timeout_s), (
                f"{self.count} of {count} requests ended in {timeout_s} s"
            )

    def wait_for_version(self, version: str, timeout_s: float = 60.0) -> None:
        """Until `version` has answered."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(v == version for _, v in list(self.answers)), timeout_s
            ), f"version {version} did not answer within {timeout_s} s: {self.answers}"

    async def _run(self) -> None:
        await asyncio.gather(*(self._client(i) for i in range(self._connections)))

    async def _client(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                self._end(lambda error=error: self.broken.append(f"connect: {error}"))
                await asyncio.sleep(0.05)
                continue
            try:
                await self._talk(reader, writer, number)
            except (OSError, EOFError) as error:
                self._end(lambda error=error: self.broken.append(repr(error)))
            finally:
                writer.close()

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        turn = number
        while not self._stop.is_set():
            started = time.monotonic()
            number = turn % len(self._requests)
            writer.write(self._requests[number])
            turn += 1
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(_header(head, b"content-length")))
            status = int(head[9:12])
            version = _header(head, b"x-model-version").decode()
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            if status == 200:
                self._compare(number, version, body)
            self._end(lambda key=(status, version), body=body: self._count(key, body))
            if _header(head, b"connection") == b"close":
                return
            if self._pause_s:
                await asyncio.sleep(self._pause_s)

    def _compare(self, number: int, version: str, body: bytes) -> None:
        data = [v for output in json.loads(body)["outputs"] for v in output["data"]]
        first = self._first.setdefault((number, version), data)
        # Most are the same to the bit.
        if data != first and not (len(data) == len(first) and all(map(_close, data, first))):
            self.wrong = [*self.wrong[:19], (data, first)]

    def _count(self, key: tuple[int, str], body: bytes) -> None:
        self.answers[key] += 1
        if key[0] != 200 and len(self.failures) < 20:
            self.failures.append((key[0], body))

    def _end(self, record: Any) -> None:
        with self._changed:
            record()
            self._changed.notify_all()


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)


def _request(path: str, body: dict[str, Any], headers: str) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def _header(head: bytes, name: bytes) -> bytes:
    _, found, rest = head.partition(b"\r\n" + name + b":")
    return rest.partition(b"\r\n")[0].strip() if found else b""
