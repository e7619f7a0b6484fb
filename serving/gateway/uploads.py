"""Large request bodies, received where they stay.

A body comes through the HTTP parser in pieces, and each of them is copied several times. So when a
large part of a body of known length is still to come, the connection hands its transport to an
`Upload`, which reads that part from the socket into its place, and hands the transport back.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from typing_extensions import override

if TYPE_CHECKING:
    from serving.gateway.exchange import Exchange
    from serving.gateway.http import HttpConnection

# What is still to come of a body, at least: below it the hand-over costs more than the copies.
MIN_UPLOAD_BYTES: Final = 1 << 17


class Upload(asyncio.BufferedProtocol):
    """Reads the rest of one exchange's body; everything else is the connection's to handle."""

    def __init__(self, connection: HttpConnection, exchange: Exchange) -> None:
        self._connection = connection
        self._exchange = exchange
        self._rest = exchange.make_room()
        connection.transport.set_protocol(self)

    @override
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._rest

    @override
    def buffer_updated(self, nbytes: int) -> None:
        self._rest = self._rest[nbytes:]
        # It has its answer already where it was refused: it took too long, or too much memory.
        if not self._exchange.received:
            self._exchange.count(self._exchange.headers.content_length - len(self._rest))
        if self._exchange.received or not self._rest:
            self._connection.transport.set_protocol(self._connection)
            self._connection.upload_ended()

    @override
    def eof_received(self) -> bool:
        return self._connection.eof_received()

    @override
    def pause_writing(self) -> None:
        self._connection.pause_writing()

    @override
    def resume_writing(self) -> None:
        self._connection.resume_writing()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)
