"""An HTTP client that sends exactly the bytes it is told to."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60.0


@dataclass
class Reply:
    """One response; header names are lower-case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error reply, which must have one."""
        assert self.headers["content-type"] == "application/json", self
        (message,) = self.json.values()
        assert set(self.json) == {"error"}
        assert isinstance(message, str)
        assert message
        return message

    @property
    def values(self) -> list[float]:
        """The data of the first output."""
        assert self.status == 200, self
        data: list[float] = self.json["outputs"][0]["data"]
        return data


class Client:
    """One connection. `receive_buffer` bytes bound what the kernel takes for a slow reader."""

    def __init__(self, port: int, receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *parts: bytes) -> Client:
        self.sock.sendall(b"".join(parts))
        return self

    def send_eof(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def ask(self, *parts: bytes) -> Reply:
        return self.send(*parts).reply()

    def reply(self) -> Reply:
        """The next response; `EOFError` if the connection is closed instead."""
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, _ = head[0].split(" ", 2)
        assert version == "HTTP/1.1"
        headers: dict[str, str] = {}
        for line in head[1:-2]:
            name, _, value = line.partition(": ")
            assert name not in headers, f"{name} twice"
            headers[name.lower()] = value
        return Reply(int(status), headers, self._exactly(int(headers.get("content-length", 0))))

    def closed(self) -> bool:
        """Whether the server closes the connection without another byte."""
        try:
            return self._data == b"" and self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self._receive():
                pass
        data, self._data = self._data, b""
        return data

    def _receive(self) -> bool:
        data = self.sock.recv(1 << 16)
        self._data += data
        return bool(data)

    def _until(self, end: bytes) -> bytes:
        while end not in self._data:
            if not self._receive():
                raise EOFError(f"closed after {self._data!r}")
        at = self._data.index(end) + len(end)
        found, self._data = self._data[:at], self._data[at:]
        return found

    def _exactly(self, size: int) -> bytes:
        parts = [self._data[:size]]
        self._data, missing = self._data[size:], size - len(parts[0])
        while missing:
            data = self.sock.recv(min(missing, 1 << 20))
            if not data:
                raise EOFError(f"closed {missing} bytes early")
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)


def head(method: str, target: str, *headers: str, version: str = "1.1") -> bytes:
    """A request's head, with nothing added to what is given but Host."""
    lines = [f"{method} {target} HTTP/{version}", "Host: gateway", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def get(target: str, *headers: str) -> bytes:
    return head("GET", target, *headers)


def post(target: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    return head("POST", target, f"Content-Length: {len(body)}", *headers, version=version) + body


def chunked(target: str, chunks: Iterable[bytes], *headers: str, trailers: bytes = b"") -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks)
    return head("POST", target, "Transfer-Encoding: chunked", *headers) + framed + last(trailers)


def last(trailers: bytes = b"") -> bytes:
    """The last chunk."""
    return b"0\r\n" + trailers + b"\r\n"


def tensor(name: str, rows: Any, datatype: str = "FP32", shape: Any = None) -> dict[str, Any]:
    if shape is None:
        shape = [len(rows), len(rows[0])]
    return {"name": name, "shape": shape, "datatype": datatype, "data": rows}


def body(*rows: Any, **members: Any) -> bytes:
    """An inference request with one input x of these rows; a number n stands for [n, n]."""
    pairs = [r if isinstance(r, list) else [r, r] for r in rows]
    return json.dumps({"inputs": [tensor("x", pairs)], **members}).encode()


def infer(model: str, *rows: Any, headers: Iterable[str] = (), **members: Any) -> bytes:
    """A whole request for that."""
    return post(f"/v2/models/{model}/infer", body(*rows, **members), *headers)
