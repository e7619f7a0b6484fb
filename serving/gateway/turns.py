"""Whose turn it is on a connection: requests are answered one at a time, in order of arrival.

At most one request is being answered, later ones wait in `pipeline`, and nothing more is read while
any waits or while the client does not take its reply.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serving.errors import RequestTimeout
from serving.gateway.exchange import Exchange
from serving.gateway.infer import monotonic

if TYPE_CHECKING:
    from serving.gateway.front import HttpFront

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
SWEEP_S: Final = 0.5
LINGER_S: Final = 2.0
FAREWELL_S: Final = 0.25


class Turns(HttpToolsProtocol):
    """The answering half of a connection."""

    pipeline: deque[tuple[Any, Any]]

    def __init__(
        self,
        front: HttpFront,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.front = front
        # The request whose body is being received, and the one that is being answered.
        self.incoming: Exchange | RequestResponseCycle | None = None
        self.active: Exchange | RequestResponseCycle | None = None
        self._receiving = False
        # Nothing more is parsed.
        self._dead = False
        self._eof = False
        self._since = front.clock
        self._advancing = False
        self._blocked_since = 0.0
        self._lingering = False
        # Nothing is asked on this connection after the request at hand, or the next.
        self._stopping_since = 0.0
        self._ending_since = 0.0

    @abstractmethod
    def refuse(self, error: Exception) -> None:
        """Answer the message being received with an error, in its turn, and close."""

    @override
    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what was asked before the client closed its half, then close ours."""
        self._eof = True
        if self._lingering or (self._receiving and self.active is self.incoming):
            return False
        return self.active is not None or bool(self.pipeline)

    @override
    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self.flow.pause_reading()
        self._blocked_since = monotonic()

    @override
    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if self.active is None:
            self._advance()
        elif not self.pipeline:
            self.flow.resume_reading()

    def start_or_queue(self, exchange: Exchange) -> None:
        """It is the exchange's turn now, or after those before it."""
        if self._stopping_since:
            exchange.keep_alive = False
        if self.active is None and not self.pipeline and not self.flow.write_paused:
            self.active = exchange
            if exchange.received:
                exchange.run()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.active = cycle
        if self._stopping_since:
            cycle.keep_alive = False
        super()._start_asgi_task(cycle, app)

    @override
    def on_response_complete(self) -> None:
        """One answer is written: on to the next request, or wait for it."""
        self.server_state.total_requests += 1
        self.active = None
        self._since = self.front.clock
        self._advance()

    def _advance(self) -> None:
        """Begin to answer the next request. Many may be answered at once, so no recursion."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self.active is None and self._may_answer():
                cycle, app = self.pipeline.pop()
                if isinstance(cycle, Exchange):
                    self._take_turn(cycle)
                else:
                    self._start_asgi_task(cycle, app)
        finally:
            self._advancing = False

    def _may_answer(self) -> bool:
        """Whether a request waits and may be answered now; if none waits, read on or close."""
        if self.flow.write_paused or self._lingering or self.transport.is_closing():
            return False
        if not self.pipeline:
            if self._eof:
                self.transport.close()
            else:
                self.flow.resume_reading()
        return bool(self.pipeline)

    def _take_turn(self, exchange: Exchange) -> None:
        self.active = exchange
        if exchange.received:
            exchange.run()
        elif self._eof:
            self.transport.close()
        else:
            # Its body is still to come.
            self.flow.resume_reading()
            if exchange.headers.expect_continue:
                self.transport.write(CONTINUE)

    def end(self) -> None:
        """Close behind the last reply: at first our half only, if the client may still be sending.

        Closing with unread bytes in the socket would reset the connection, and the reset can
        overtake the reply: a client that is refused mid-upload would never learn why.
        """
        refused, self._dead = self._dead, True
        if (self._receiving or refused) and not self.transport.is_closing():
            self._lingering = True
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()

    @override
    def shutdown(self) -> None:
        """The server stops: the request read last is the last that is answered.

        An idle connection is left open for a moment. Its client may have sent a request that is not
        here yet; to close now would lose it unread, with a reset for an answer.
        """
        self._stopping_since = monotonic()
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def enforce_time_bounds(self, now: float) -> None:
        """Close what is idle, refuse what arrives too slowly, drop who does not read."""
        limits = self.front.limits
        # `_since` was read off the sweep's clock, and may be as early as the sweep before it.
        waited = now - self._since - SWEEP_S
        if self._lingering or self.transport.is_closing():
            self._ending_since = self._ending_since or now
            patience = LINGER_S if self._lingering else limits.write_timeout_s
            if now - self._ending_since > patience:
                self.transport.abort()
        elif self.flow.write_paused:
            if now - self._blocked_since > limits.write_timeout_s:
                self.transport.abort()
        elif self._receiving:
            late = waited > limits.read_timeout_s
            if late and not self._dead and not self.flow.read_paused:
                self.refuse(
                    RequestTimeout(f"the request did not arrive within {limits.read_timeout_s} s")
                )
        elif self.active is None and (
            waited > limits.keep_alive_s
            or (self._stopping_since and now - self._stopping_since > FAREWELL_S)
        ):
            self.transport.close()
