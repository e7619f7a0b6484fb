"""The frame server: one blocking thread a connection reads a batch, runs it and answers.

A gateway opens some data connections, each with at most one batch in flight, and one heartbeat
connection. No event loop and no hand-over stands between the socket and the model: `Engine.submit`
runs on the reader's thread. A malformed frame closes its connection and touches no other.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from serving.core.frames import (
    PREFIX,
    FrameError,
    Kind,
    decode_json,
    decode_prefix,
    encode_json,
    encode_prefix,
)
from serving.errors import ServingError
from serving.replica.engine import Engine
from serving.replica.wire import Buffer, Codec, failed

_log = logging.getLogger(__name__)

_FIRST_READ_BYTES: Final = 64 << 10
_SOCKET_BUFFER_BYTES: Final = 4 << 20
_KEEP_BUFFER_BYTES: Final = 64 << 20
_HELLO_TIMEOUT_S: Final = 10.0
_MAX_HELLO_BYTES: Final = 4096
_MAX_STRANGERS: Final = 64  # each takes a thread for at most _HELLO_TIMEOUT_S
_DRAINED_IDLE_S: Final = 0.5
_DRAIN_POLL_S: Final = 0.02
_MAX_BUFFERS: Final = 1000  # sendmsg takes at most IOV_MAX (1024) of them
_STALLED: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TlsListener:
    """Where to listen for gateways of other nodes, and with which certificate."""

    host: str
    context: ssl.SSLContext
    port: int = 0


class ReplicaServer:
    """Serves one engine on a unix socket and, with `tls`, on TCP with mutual TLS.

    `identity` is what WELCOME tells a gateway: model, version, digest, replica.
    """

    def __init__(
        self,
        engine: Engine,
        unix_path: str | Path,
        identity: Mapping[str, Any],
        tls: TlsListener | None = None,
    ) -> None:
        self.engine = engine
        self.unix_path = str(unix_path)
        self.tcp_address: str | None = None
        self._welcome = encode_json(Kind.WELCOME, dict(identity))
        self._tls = tls
        self._codec = Codec(engine.backend.signature)
        self._listeners: list[socket.socket] = []
        self._acceptors: list[threading.Thread] = []
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Listen. Raises `OSError` if an address cannot be taken, or the directory is not ours."""
        directory = Path(self.unix_path).parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            # Under /tmp anyone may have made it first, and could put his own socket there.
            raise PermissionError(f"{directory}: is not a directory of this user")
        directory.chmod(0o700)
        # A socket file outlives the process that made it.
        Path(self.unix_path).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self.unix_path)
        listener.listen(128)
        self._accept_on(listener, None)
        if self._tls is not None:
            tcp = socket.create_server((self._tls.host, self._tls.port), backlog=128)
            host, port = tcp.getsockname()[:2]
            self.tcp_address = f"{host}:{port}"
            self._accept_on(tcp, self._tls.context)

    def drain(self, limit_s: float) -> bool:
        """Wait until no batch has been in flight for half a second, at most `limit_s` seconds.

        Returns whether that was so in the end.
        """
        deadline = time.monotonic() + limit_s
        while self.idle_s < _DRAINED_IDLE_S:
            if time.monotonic() >= deadline:
                return False
            self._stopping.wait(_DRAIN_POLL_S)
        return True

    def stop(self) -> None:
        """Close every socket. A batch that is running ends unanswered: drain first."""
        with self._lock:
            self._stopping.set()
            connections = list(self._connections)
        for listener in self._listeners:
            # close alone would leave the thread in accept.
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for connection in connections:
            connection.shut_down()
        Path(self.unix_path).unlink(missing_ok=True)

    @property
    def listening(self) -> bool:
        """Whether connections are taken on every address."""
        return bool(self._acceptors) and all(thread.is_alive() for thread in self._acceptors)

    @property
    def idle_s(self) -> float:
        """How long no batch has been read, run or answered, in seconds."""
        with self._lock:
            connections = list(self._connections)
        return min((c.idle_s for c in connections), default=self.engine.idle_s)

    def _accept_on(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        acceptor = threading.Thread(
            target=self._accept, args=(listener, context), name="replica-accept", daemon=True
        )
        self._listeners.append(listener)
        self._acceptors.append(acceptor)
        acceptor.start()

    def _accept(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                _log.error("accepting a connection failed: %s", error)
                self._stopping.wait(0.1)  # out of file descriptors: others may close
                continue
            connection = Connection(sock, context, self.engine, self._codec, self._welcome)
            with self._lock:
                if self._stopping.is_set():
                    sock.close()
                    return
                if connection.remote and self._strangers() >= _MAX_STRANGERS:
                    sock.close()
                    continue
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name="replica-connection", daemon=True
            ).start()

    def _strangers(self) -> int:
        """Connections from other nodes that have not shown a certificate yet."""
        return sum(c.remote and not c.welcomed for c in self._connections)

    def _serve(self, connection: Connection) -> None:
        try:
            connection.serve()
        except (EOFError, ConnectionError):
            _log.debug("a gateway went away")
        except (FrameError, OSError, MemoryError) as error:
            _log.warning("a connection was closed: %s", error)
        except Exception:
            _log.exception("a connection was closed")
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)


class Connection:
    """One gateway connection, served by one thread."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        engine: Engine,
        codec: Codec,
        welcome: bytes,
    ) -> None:
        self._sock = sock
        self._context = context
        self._engine = engine
        self._codec = codec
        self._welcome = welcome
        self.remote = context is not None
        self.welcomed = False
        self._payload = np.empty(0, np.uint8)
        self._busy = False
        self._last_end = time.monotonic()

    @property
    def idle_s(self) -> float:
        """How long this connection has had no batch, in seconds."""
        return 0.0 if self._busy else time.monotonic() - self._last_end

    def serve(self) -> None:
        """Handshake, then answer frames until the peer closes.

        Raises `EOFError` or `OSError` when the connection ends, `FrameError` on a malformed frame.
        """
        self._set_up()
        role = self._handshake()
        self._sock.settimeout(None)
        if role == "heartbeat":
            self._answer_pings()
        else:
            self._answer_batches()

    def shut_down(self) -> None:
        """End the connection from another thread: its reader wakes with an end of file."""
        with suppress(OSError):
            # Not SSLSocket.shutdown, which drops the TLS object under the reader.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket."""
        self._sock.close()

    def _set_up(self) -> None:
        self._sock.settimeout(_HELLO_TIMEOUT_S)
        if self._sock.family != socket.AF_UNIX:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A gateway's node that vanished frees its threads here within a minute.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        if self._context is not None:
            self._sock = self._context.wrap_socket(self._sock, server_side=True)

    def _handshake(self) -> str:
        head = memoryview(bytearray(PREFIX.size))
        self._fill(head)
        try:
            kind, _, size, payload = decode_prefix(head)
            if kind is not Kind.HELLO or payload or size > _MAX_HELLO_BYTES:
                raise FrameError("the first frame is not a HELLO")
            meta = memoryview(bytearray(size))
            self._fill(meta)
            role = decode_json(meta).get("role")
            if role not in ("data", "heartbeat"):
                raise FrameError(f"HELLO asks for role {role!r}; expected data or heartbeat")
        except (FrameError, RecursionError) as error:
            self._sock.sendall(encode_json(Kind.REFUSED, {"error": str(error)}))
            raise FrameError(str(error)) from error
        self._sock.sendall(self._welcome)
        self.welcomed = True
        return str(role)

    def _answer_pings(self) -> None:
        head = memoryview(bytearray(PREFIX.size))
        while True:
            self._fill(head)
            kind, tensors, meta, payload = decode_prefix(head)
            if kind is not Kind.PING or tensors or meta or payload:
                raise FrameError(f"a {kind.name} frame on a heartbeat connection")
            stalled = _STALLED.pack(int(self._engine.stalled_s * 1e6))
            self._sock.sendall(encode_prefix(Kind.PONG, 0, len(stalled), 0) + stalled)

    def _answer_batches(self) -> None:
        # One read takes in a small batch whole. Only what arrived with the head is copied: the rest
        # of a large payload is received where it stays.
        head = memoryview(bytearray(_FIRST_READ_BYTES))
        have = 0
        while True:
            while have < PREFIX.size:
                have += self._receive(head[have:])
            self._busy = True
            arrived = time.monotonic()
            kind, tensors, meta_size, size = decode_prefix(head)
            if kind is not Kind.INFER:
                raise FrameError(f"a {kind.name} frame on a data connection")
            body = PREFIX.size + meta_size
            if body > len(head):
                head = _grown(head, body, have)
            while have < body:
                have += self._receive(head[have:])
            payload = self._read_payload(head[body:have], size)
            surplus = max(0, have - body - size)
            self._answer(head[PREFIX.size : body], tensors, payload, arrived)
            if surplus:
                head[:surplus] = bytes(head[have - surplus : have])
            have = surplus
            if self._payload.nbytes > _KEEP_BUFFER_BYTES:
                del payload
                self._payload = np.empty(0, np.uint8)
            self._last_end = time.monotonic()
            self._busy = False

    def _read_payload(self, start: memoryview, size: int) -> memoryview:
        """The whole payload in an aligned buffer; `start` is what has arrived (perhaps more)."""
        if self._payload.nbytes < size:
            self._payload = np.empty(size, np.uint8)
        payload = memoryview(self._payload)[:size]  # type: ignore[arg-type]
        have = min(len(start), size)
        payload[:have] = start[:have]
        self._fill(payload[have:])
        return payload

    def _answer(self, meta: memoryview, tensors: int, payload: memoryview, arrived: float) -> None:
        batch_id, work = self._codec.decode(meta, tensors, payload, arrived)
        if isinstance(work, ServingError):
            self._sock.sendall(failed(batch_id, work))
            return
        self._engine.submit(work)
        self._send(self._codec.encode(batch_id, work))

    def _send(self, buffers: Sequence[Buffer]) -> None:
        sock = self._sock
        if isinstance(sock, ssl.SSLSocket) or len(buffers) > _MAX_BUFFERS:
            # TLS has no sendmsg, and a record of its own for the head would cost a packet.
            sock.sendall(b"".join(buffers))
            return
        sent = sock.sendmsg(buffers)
        if sent == sum(map(len, buffers)):
            return
        for buffer in buffers:
            # sendmsg may stop anywhere; what it took is skipped, the rest follows.
            if sent < len(buffer):
                sock.sendall(memoryview(buffer)[sent:])
            sent = max(0, sent - len(buffer))

    def _receive(self, view: memoryview) -> int:
        count = self._sock.recv_into(view)
        if not count:
            raise EOFError
        return count

    def _fill(self, view: memoryview) -> None:
        at = 0
        while at < len(view):
            at += self._receive(view[at:])


def _grown(buffer: memoryview, size: int, used: int) -> memoryview:
    bigger = memoryview(bytearray(size))
    bigger[:used] = buffer[:used]
    return bigger
