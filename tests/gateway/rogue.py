"""A replica that says whatever a test wants it to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from serving.core import frames
from serving.core.frames import Kind, TensorEntry
from serving.core.routing import Endpoint
from tests.gateway.harness import DIGEST, NODE
from tests.gateway.models import VECTOR

Answer = Callable[[int, int, bytes], bytes | None]


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def result(batch_id: int, rows: int, data: bytes, **changes: Any) -> bytes:
    """A RESULT for one FP32 output of shape [rows, 2]; `changes` make it wrong."""
    entry = TensorEntry(changes.get("index", 0), "FP32", changes.get("shape", (rows, 2)), len(data))
    head = frames.RESULT_HEAD.pack(batch_id, changes.get("said", rows), max(rows, 1), 0, 10)
    meta = head + frames.encode_table([entry])
    payload = data + frames.padding(len(data))
    return frames.encode_prefix(Kind.RESULT, 1, len(meta), len(payload)) + meta + payload


class Rogue:
    """Listens like a replica. `answer(batch id, rows, payload)` gives the bytes of its reply.

    None for a reply closes the connection. `welcome` is what it says to a HELLO, and `pongs` how
    many PINGs of a connection it answers.
    """

    signature = VECTOR

    def __init__(
        self,
        directory: Path,
        answer: Answer,
        *,
        welcome: bytes | None = None,
        pongs: int = 1 << 30,
        name: str = "rogue",
    ) -> None:
        self.endpoint = Endpoint(name, NODE, str(directory / f"{name}.sock"))
        self.connections = 0
        self.batches: list[int] = []
        self._answer = answer
        self._pongs = pongs
        identity = {"model": "m", "version": "1", "digest": DIGEST, "replica": name}
        self._welcome = frames.encode_json(Kind.WELCOME, identity) if welcome is None else welcome
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.endpoint.unix)
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError, EOFError):
            self._frame(sock)
            sock.sendall(self._welcome)
            pongs = 0
            while True:
                kind, meta, payload = self._frame(sock)
                if kind is Kind.PING:
                    pongs += 1
                    if pongs <= self._pongs:
                        sock.sendall(frames.encode_prefix(Kind.PONG, 0, 8, 0) + bytes(8))
                    continue
                batch_id, rows, _, _ = frames.INFER_HEAD.unpack_from(meta)
                self.batches.append(rows)
                reply = self._answer(batch_id, rows, payload)
                if reply is None:
                    return
                sock.sendall(reply)

    def _frame(self, sock: socket.socket) -> tuple[Kind, bytes, bytes]:
        head = read_exactly(sock, frames.PREFIX.size)
        kind, _, meta, payload = frames.decode_prefix(head)
        return kind, read_exactly(sock, meta), read_exactly(sock, payload)

    def stop(self) -> None:
        for sock in [self._listener, *self._open]:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()
        Path(self.endpoint.unix).unlink()
