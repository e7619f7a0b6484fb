"""Connections from this gateway to one replica.

A link is a few data connections, each with at most one batch in flight, and one heartbeat
connection. The loss of any of them, or three unanswered heartbeats, is the loss of the replica:
its batches are handed back at once to be sent elsewhere. A lost link reconnects by itself for as
long as the route table lists its replica.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from serving.core import frames
from serving.core.frames import FrameError, Kind, TensorEntry
from serving.core.routing import Endpoint
from serving.gateway.layouts import Buffer, IncomingLayouts, Outgoing
from serving.gateway.receiver import FrameReceiver

log = logging.getLogger(__name__)

BATCHES_IN_FLIGHT: Final = 2
HEARTBEAT_S: Final = 0.5
HEARTBEATS_MISSED: Final = 3
CONNECT_TIMEOUT_S: Final = 5.0
BACKOFF_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
# Below this a batch is joined into one buffer; a large one is written without a copy.
_JOIN_BYTES: Final = 1 << 16

BatchT = TypeVar("BatchT")


class LinkOwner(Protocol[BatchT]):
    """Who a link belongs to: told what becomes of the batches it handed out."""

    def link_up(self, link: ReplicaLink[BatchT]) -> None:
        """The replica can take batches."""

    def link_closed(self, link: ReplicaLink[BatchT]) -> None:
        """A link that was drained has ended for good."""

    def link_down(self, link: ReplicaLink[BatchT], lost: list[BatchT]) -> None:
        """The replica is gone, and `lost` with it."""

    def batch_done(
        self,
        link: ReplicaLink[BatchT],
        batch: BatchT,
        head: tuple[int, int, int, int, int],
        entries: Sequence[TensorEntry],
        tensors: Sequence[memoryview],
    ) -> None:
        """`head` is RESULT's: batch id, rows, run rows, queue µs, compute µs."""

    def batch_failed(
        self, link: ReplicaLink[BatchT], batch: BatchT, slug: str, message: str
    ) -> None:
        """The replica could not run the batch."""


class _Connection(FrameReceiver, Generic[BatchT]):
    """Handshake and loss, common to both roles."""

    def __init__(self, link: ReplicaLink[BatchT], role: str) -> None:
        super().__init__()
        self.link = link
        self.role = role
        self.closed = False
        self.welcome: asyncio.Future[dict[str, Any]] = link.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        hello = {"role": self.role, "gateway": self.link.gateway}
        self.transport.write(frames.encode_json(Kind.HELLO, hello))  # type: ignore[union-attr]

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if not self.welcome.done():
            self.welcome.set_exception(ConnectionError(f"closed before WELCOME: {exc}"))
        else:
            self.link.connection_lost(self)

    def frame(self, kind: Kind, tensors: int, meta: memoryview, payload: memoryview) -> None:
        if kind is Kind.WELCOME and not self.welcome.done():
            self.welcome.set_result(frames.decode_json(meta))
        elif kind is Kind.REFUSED and not self.welcome.done():
            error = frames.decode_json(meta).get("error")
            self.welcome.set_exception(ConnectionError(f"refused: {error}"))
        else:
            raise FrameError(f"unexpected {kind.name} on a {self.role} connection")


class _DataConnection(_Connection[BatchT]):
    """Carries one batch at a time."""

    def __init__(self, link: ReplicaLink[BatchT]) -> None:
        super().__init__(link, "data")
        self.batch: BatchT | None = None
        self.batch_id = 0

    def frame(self, kind: Kind, tensors: int, meta: memoryview, payload: memoryview) -> None:
        if kind is Kind.RESULT:
            head = frames.RESULT_HEAD.unpack_from(meta)
            table = bytes(meta[frames.RESULT_HEAD.size :])
            layout = self.link.layouts.read(table, tensors, len(payload))
            batch = self._finish(head[0])
            outputs = [payload[a:b] for a, b in layout.spans]
            self.link.owner.batch_done(self.link, batch, head, layout.entries, outputs)
        elif kind is Kind.FAILED:
            body = frames.decode_json(meta, frames.BATCH_ID.size)
            batch = self._finish(frames.BATCH_ID.unpack_from(meta)[0])
            self.link.owner.batch_failed(
                self.link, batch, str(body.get("slug")), str(body.get("message"))
            )
        else:
            super().frame(kind, tensors, meta, payload)

    def _finish(self, batch_id: int) -> BatchT:
        batch = self.batch
        if batch is None or batch_id != self.batch_id:
            raise FrameError(f"answer to batch {batch_id}, which is not in flight here")
        self.batch = None
        self.link.connection_free(self)
        return batch


class _HeartbeatConnection(_Connection[BatchT]):
    """PING and PONG."""

    def __init__(self, link: ReplicaLink[BatchT]) -> None:
        super().__init__(link, "heartbeat")
        self.missed = 0

    def frame(self, kind: Kind, tensors: int, meta: memoryview, payload: memoryview) -> None:
        if kind is Kind.PONG:
            self.missed = 0
        else:
            super().frame(kind, tensors, meta, payload)

    def beat(self) -> None:
        """Send a PING; drop the link when the last three were not answered."""
        if self.missed >= HEARTBEATS_MISSED:
            log.warning("replica %s missed %d heartbeats", self.link.endpoint.replica, self.missed)
            self.link.lost()
            return
        self.missed += 1
        if self.transport is not None:
            self.transport.write(frames.encode_prefix(Kind.PING, 0, 0, 0))


class ReplicaLink(Generic[BatchT]):
    """A gateway's way to one replica. `start` once; `close` ends it for good."""

    def __init__(
        self,
        owner: LinkOwner[BatchT],
        endpoint: Endpoint,
        *,
        gateway: str,
        node: str,
        digest: str,
        tls: Callable[[], ssl.SSLContext],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.owner = owner
        self.endpoint = endpoint
        self.gateway = gateway
        self.loop = loop
        self.draining = False
        # When the owner last used this link, by a count of its own.
        self.turn = 0
        self.layouts = IncomingLayouts()
        self._idle: list[_DataConnection[BatchT]] = []
        # Whether a batch is there that must have the replica to itself.
        self.exclusive = False
        # Most rows in a batch, for its owner.
        self.max_size = 0
        self._node = node
        self._digest = digest
        self._tls = tls
        self._data: list[_DataConnection[BatchT]] = []
        self._heartbeat: _HeartbeatConnection[BatchT] | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._next_id = 0
        self._up = False
        self._closed = False
        self._failures = 0
        self._connecting: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether the replica is there and is to be given batches."""
        return self._up and not self.draining

    @property
    def in_flight(self) -> int:
        """Batches on their way."""
        return len(self._data) - len(self._idle) if self._up else 0

    def can_take(self) -> bool:
        """Whether a batch may be sent now."""
        return bool(self._idle) and self.up and not self.exclusive

    def batches(self) -> list[BatchT]:
        """The batches on their way."""
        return [c.batch for c in self._data if c.batch is not None]

    def start(self) -> None:
        """Begin to connect."""
        self._connecting = self.loop.create_task(self._connect())

    def send(
        self,
        batch: BatchT,
        rows: int,
        budget_us: int,
        layout: Outgoing,
        pieces: list[Buffer],
        *,
        alone: bool,
    ) -> None:
        """Send a batch that the link can take; `pieces` are the payload that `layout` describes.

        With `alone` nothing else is sent until it is answered, and the replica merges it with none.
        """
        connection = self._idle.pop()
        self.exclusive = alone
        self._next_id += 1
        connection.batch, connection.batch_id = batch, self._next_id
        flags = frames.NO_MERGE if alone else 0
        meta = frames.INFER_HEAD.pack(self._next_id, rows, flags, budget_us) + layout.table
        prefix = frames.encode_prefix(Kind.INFER, layout.tensors, len(meta), layout.payload)
        transport = connection.transport
        if layout.payload < _JOIN_BYTES:
            transport.write(b"".join((prefix, meta, *pieces)))  # type: ignore[union-attr]
        else:
            transport.writelines((prefix, meta, *pieces))  # type: ignore[union-attr]

    def connection_free(self, connection: _DataConnection[BatchT]) -> None:
        """A connection's batch has been answered."""
        self.exclusive = False
        self._idle.append(connection)
        if self.draining:
            self.loop.call_soon(self._close_if_drained)

    def drain(self) -> None:
        """Take no more batches, and close when those in flight are answered."""
        self.draining = True
        self._close_if_drained()

    def undrain(self) -> None:
        """Stay after all."""
        self.draining = False

    def _close_if_drained(self) -> None:
        if self.draining and not self.in_flight and not self._closed:
            self.close()
            self.owner.link_closed(self)

    def close(self) -> asyncio.Task[None] | None:
        """Drop the connections. Batches in flight are handed to the owner as lost.

        Returns the task that connects, if it has yet to notice that it is cancelled.
        """
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self.lost()
        return self._connecting

    def connection_lost(self, connection: _Connection[BatchT]) -> None:
        """Take the replica out, unless the connection is one that was given up before."""
        if connection is self._heartbeat or connection in self._data:
            self.lost()

    def lost(self) -> None:
        """Take the replica out and, unless closed, try to reach it again."""
        was_up, self._up = self._up, False
        batches = self.batches()
        if self._closed or was_up:
            self._drop_connections()
        if was_up:
            self._failures = 0
            if not self._closed:
                self.start()
            self.owner.link_down(self, batches)
            self._close_if_drained()

    def _drop_connections(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None
        connections: list[_Connection[BatchT]] = [*self._data]
        if self._heartbeat is not None:
            connections.append(self._heartbeat)
        self._data, self._idle, self._heartbeat = [], [], None
        self.exclusive = False
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def _connect(self) -> None:
        while not self._closed:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._open_all()
                break
            except Exception as error:
                # Whatever it was: a replica that is listed is tried again for ever.
                self._drop_connections()
                if self._failures == len(BACKOFF_S):
                    log.warning("replica %s is not reachable: %s", self.endpoint.replica, error)
                delay = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
                self._failures += 1
                await asyncio.sleep(delay)
        self._idle = list(self._data)
        self._up = True
        self._beat_on()
        self.owner.link_up(self)

    async def _open_all(self) -> None:
        self._data = []
        for _ in range(BATCHES_IN_FLIGHT):
            self._data.append(await self._open(_DataConnection(self)))
        self._heartbeat = await self._open(_HeartbeatConnection(self))
        if self._heartbeat.closed or any(c.closed for c in self._data):
            raise ConnectionError("it closed a connection while the others were opened")

    async def _open(self, connection: _C) -> _C:
        if self.endpoint.unix and self.endpoint.node == self._node:
            await self.loop.create_unix_connection(lambda: connection, self.endpoint.unix)
        elif self.endpoint.tcp:
            host, _, port = self.endpoint.tcp.rpartition(":")
            await self.loop.create_connection(
                lambda: connection, host, int(port), ssl=self._tls(), server_hostname=host
            )
        else:
            raise ConnectionError("it listens on its own node only")
        try:
            welcome = await connection.welcome
            if welcome.get("digest") != self._digest:
                raise ConnectionError(
                    f"it serves {welcome.get('digest')}, the route table says {self._digest}"
                )
        except BaseException:
            if connection.transport is not None:
                connection.transport.abort()
            raise
        return connection

    def _beat_on(self) -> None:
        if self._heartbeat is None:
            return
        self._beat = self.loop.call_later(HEARTBEAT_S, self._beat_on)
        self._heartbeat.beat()


_C = TypeVar("_C", bound=_Connection[Any])
