"""HTTP for inference, without a task, a future or an ASGI scope a request.

`HttpConnection` extends uvicorn's httptools protocol. A POST to `/v2/models/…/infer` becomes an
`Exchange`; every other request takes uvicorn's way into Starlette. Both kinds share the connection:
at most one is being answered at a time, later ones wait in `pipeline` in their order of arrival.

`Exchange` stands in for uvicorn's `RequestResponseCycle` where that class only looks at
`response_complete`, `disconnected` and `keep_alive`; the uvicorn version is pinned for it.

Bounds, all enforced while reading: head bytes, body bytes, time to receive a request, time an idle
connection is kept, time a client may take to accept its reply. A client that does not read its
replies is not read from either, so it holds the memory of one reply.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Final

import httptools
from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serving.errors import HeadersTooLarge, InvalidRequest, PayloadTooLarge, RequestTimeout
from serving.gateway.exchange import Exchange
from serving.gateway.infer import Pipeline, monotonic
from serving.gateway.routes import Routes

log = logging.getLogger(__name__)

_PREFIX: Final = b"/v2/models/"
_SUFFIX: Final = b"/infer"
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
SWEEP_S: Final = 0.5
LINGER_S: Final = 2.0


@dataclass(slots=True)
class HttpLimits:
    """Bounds on one connection. Bytes and seconds."""

    max_body_bytes: int
    max_header_bytes: int
    keep_alive_s: float
    read_timeout_s: float
    write_timeout_s: float


class HttpFront:
    """What all connections of a gateway share."""

    def __init__(
        self,
        pipeline: Pipeline,
        routes: Routes,
        limits: HttpLimits,
        loop: asyncio.AbstractEventLoop,
        request_id_prefix: str,
    ) -> None:
        self.pipeline = pipeline
        self.routes = routes
        self.limits = limits
        self.loop = loop
        self.connections: set[HttpConnection] = set()
        self.unrouted: dict[str, int] = {}
        self.clock = monotonic()
        self.date = b""
        self._request_id_prefix = request_id_prefix
        self._request_number = 0
        self._sweeper: asyncio.TimerHandle | None = None

    def protocol(self) -> Callable[..., HttpConnection]:
        """For uvicorn's `http=` setting."""
        return functools.partial(HttpConnection, self)

    def next_request_id(self) -> str:
        """An id for a request that brought none, unique across gateways."""
        self._request_number += 1
        return f"{self._request_id_prefix}{self._request_number:x}"

    def count_unrouted(self, slug: str) -> None:
        """Count an inference request that reached no model."""
        self.unrouted[slug] = self.unrouted.get(slug, 0) + 1

    def sweep(self) -> None:
        """Enforce the time bounds, twice a second: a timer a request would cost more."""
        self.clock = monotonic()
        self.date = b"date: " + formatdate(usegmt=True).encode() + b"\r\n"
        for connection in list(self.connections):
            connection.enforce_time_bounds(self.clock)
        self._sweeper = self.loop.call_later(SWEEP_S, self.sweep)

    def close(self) -> None:
        """Stop sweeping."""
        if self._sweeper is not None:
            self._sweeper.cancel()


class HttpConnection(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self,
        front: HttpFront,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.front = front
        # The exchange whose message is being received; None while it is one for Starlette.
        self.exchange: Exchange | None = None
        # What is being answered now.
        self.active: Exchange | RequestResponseCycle | None = None
        self._receiving = False
        self._in_head = True
        self._head_bytes = 0
        self._body_bytes = 0
        self._dead = False
        self._eof = False
        self._lingering_since = 0.0
        self._since = front.clock
        self._blocked_since = 0.0

    # Transport events.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.front.connections.add(self)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.front.connections.discard(self)
        self.connections.discard(self)
        waiting = [cycle for cycle, _ in self.pipeline]
        for cycle in [self.active, self.exchange, self.cycle, *waiting]:
            if isinstance(cycle, Exchange):
                cycle.disconnect()
            elif cycle is not None:
                cycle.disconnected = not cycle.response_complete
                cycle.message_event.set()
        self.pipeline.clear()
        self.active = self.exchange = None
        self._dead = True
        self.flow.resume_writing()

    @override
    def data_received(self, data: bytes) -> None:
        if self._dead:
            return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No protocol switch is offered; the request was served as plain HTTP and the rest of
            # the stream is whatever the client hoped for.
            self._dead = True
        except httptools.HttpParserError as error:
            if not self._dead:
                self.refuse(InvalidRequest(f"malformed HTTP: {error}"))
        if self._in_head and self._head_bytes > self.front.limits.max_header_bytes:
            self._refuse_head()

    @override
    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what was asked before the client closed its half, then close ours."""
        self._eof = True
        if self._receiving and self.active in (None, self.cycle):
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
            self._next()

    # Parser events.

    @override
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self.exchange = None
        self._receiving = True
        self._in_head = True
        self._body_bytes = 0
        self._since = self.front.clock

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    @override
    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self._dead:
            return
        size = len(self.url)
        for name, value in self.headers:
            size += len(name) + len(value)
        if size > self.front.limits.max_header_bytes:
            self._refuse_head()
            return
        path = self.url.partition(b"?")[0]
        if (
            path.startswith(_PREFIX)
            and path.endswith(_SUFFIX)
            and self.parser.get_method() == b"POST"
        ):
            self._begin_exchange(path)
            return
        for name, value in self.headers:
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
        self._begin_asgi()

    def _begin_exchange(self, path: bytes) -> None:
        if b"%" in path:
            path = urllib.parse.unquote_to_bytes(path)
        keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() == "1.1"
        exchange = Exchange(self, path, keep_alive)
        self.exchange = exchange
        self.cycle = exchange  # type: ignore[assignment]
        exchange.read_headers(self.headers)
        if exchange.content_length > self.front.limits.max_body_bytes:
            self._refuse_body()
            return
        if exchange.expect_continue and self.active is None:
            self.transport.write(_CONTINUE)
        self._start_or_queue(exchange)

    def _begin_asgi(self) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
        }
        try:
            super().on_headers_complete()
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            self.refuse(InvalidRequest("malformed HTTP: the request target is not a valid URL"))

    @override
    def on_body(self, body: bytes) -> None:
        if self._dead:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self.front.limits.max_body_bytes:
            self._refuse_body()
        elif self.exchange is not None:
            self.exchange.chunks.append(body)
        else:
            super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._receiving = False
        self._in_head = True
        if self._dead:
            return
        exchange = self.exchange
        if exchange is None:
            super().on_message_complete()
            return
        self.exchange = None
        exchange.received = True
        if exchange is self.active:
            exchange.run()

    # Turns.

    def _start_or_queue(self, exchange: Exchange) -> None:
        if self.active is None and not self.pipeline and not self.flow.write_paused:
            self.active = exchange
            if exchange.received:
                exchange.run()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.active = cycle
        super()._start_asgi_task(cycle, app)

    @override
    def on_response_complete(self) -> None:
        """One answer is written: on to the next request, or wait for it."""
        self.server_state.total_requests += 1
        self.active = None
        self._since = self.front.clock
        if not self.transport.is_closing():
            self._next()

    def exchange_complete(self, exchange: Exchange) -> None:
        """An exchange has written its reply."""
        if not exchange.keep_alive:
            self._linger()
        self.on_response_complete()

    def _next(self) -> None:
        if self.flow.write_paused or self._lingering_since:
            return
        if not self.pipeline:
            if self._eof or self._dead:
                self.transport.close()
            else:
                self.flow.resume_reading()
            return
        cycle, app = self.pipeline.pop()
        if not isinstance(cycle, Exchange):
            self._start_asgi_task(cycle, app)
            return
        self.active = cycle
        if cycle.received:
            cycle.run()
        elif self._eof:
            self.transport.close()
        else:
            # Its body is still to come.
            self.flow.resume_reading()
            if cycle.expect_continue:
                self.transport.write(_CONTINUE)

    def _linger(self) -> None:
        """Close the sending half only, while the client may still be sending.

        Closing with unread bytes in the socket would reset the connection, and the reset can
        overtake the reply: a client that is refused mid-upload would never learn why.
        """
        if not self._receiving and not self._dead:
            self.transport.close()
            return
        self._dead = True
        self._lingering_since = monotonic()
        self.transport.write_eof()
        self.flow.resume_reading()

    # Refusals.

    def refuse(self, error: Exception) -> None:
        """Answer the message being received with an error, in its turn, and close."""
        self._dead = True
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            if self._receiving and not self._in_head and not self._take_from_asgi():
                self.transport.close()
                return
            exchange = Exchange(self, b"", keep_alive=False)
            self.cycle = exchange  # type: ignore[assignment]
        exchange.refuse(error)
        if exchange is self.active:
            exchange.run()
        elif all(exchange is not cycle for cycle, _ in self.pipeline):
            self._start_or_queue(exchange)

    def _take_from_asgi(self) -> bool:
        """Take the request being received away from Starlette, if it has not begun to answer."""
        cycle = self.cycle
        if not isinstance(cycle, RequestResponseCycle) or cycle is not self.active:
            return False
        if cycle.response_started:
            return False
        cycle.disconnected = True
        cycle.message_event.set()
        self.active = None
        return True

    def _refuse_head(self) -> None:
        limit = self.front.limits.max_header_bytes
        self.refuse(HeadersTooLarge(f"the request head exceeds {limit} bytes"))

    def _refuse_body(self) -> None:
        limit = self.front.limits.max_body_bytes
        self.refuse(PayloadTooLarge(f"the request body exceeds {limit} bytes"))

    def enforce_time_bounds(self, now: float) -> None:
        """Close what is idle, refuse what arrives too slowly, drop who does not read."""
        limits = self.front.limits
        if self._lingering_since:
            if now - self._lingering_since > LINGER_S:
                self.transport.abort()
        elif self.flow.write_paused:
            if now - self._blocked_since > limits.write_timeout_s:
                self.transport.abort()
        elif self._receiving or self._head_bytes:
            waited = now - self._since > limits.read_timeout_s
            if waited and not self._dead and not self.flow.read_paused:
                self.refuse(
                    RequestTimeout(f"the request did not arrive within {limits.read_timeout_s} s")
                )
        elif self.active is None and now - self._since > limits.keep_alive_s:
            self.transport.close()
