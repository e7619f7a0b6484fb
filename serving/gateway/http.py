"""HTTP for inference, without a task, a future or an ASGI scope a request.

`HttpConnection` extends uvicorn's httptools protocol. A POST to `/v2/models/…/infer` becomes an
`Exchange`; every other request takes uvicorn's way into Starlette. Here is what reads requests;
`turns` is what answers them in order.

`Exchange` stands in for uvicorn's `RequestResponseCycle` where that class only looks at
`response_complete`, `disconnected` and `keep_alive`; the uvicorn version is pinned for it.

Bounds, all enforced while reading: bytes of the head and of trailers, body bytes, time to receive a
request. A client that does not read its replies, or sends more requests than are being answered, is
not read from either: it holds the memory of one reply and of what one read brought.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import httptools
from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from serving import errors
from serving.gateway.exchange import Exchange
from serving.gateway.headers import RequestHeaders
from serving.gateway.heads import KnownHead, know_head
from serving.gateway.targets import host_fault, normal_path, origin_form
from serving.gateway.turns import CONTINUE, Turns
from serving.gateway.uploads import MIN_UPLOAD_BYTES, Upload

if TYPE_CHECKING:
    from serving.gateway.front import HttpFront

log = logging.getLogger(__name__)

_PREFIX: Final = b"/v2/models/"
_SUFFIX: Final = b"/infer"


class HttpConnection(Turns):
    """One client connection."""

    def __init__(
        self,
        front: HttpFront,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(front, config, server_state, app_state, _loop)
        self._in_head = True
        # Bytes since a head was complete or a piece of a body came: a head, trailers.
        self._loose_bytes = 0
        self._received = 0
        # Messages that began in the piece of data at hand, and the head that the next may repeat.
        self._begun = 0
        self._known: KnownHead | None = None
        self._body_bytes = 0
        self._upgrading = False

    # Transport events.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        connections = self.front.connections
        connections.add(self)
        limit = self.front.limits.max_connections
        if len(connections) > limit:
            self.refuse(
                errors.Unavailable(
                    f"this gateway has {limit} client connections, all that it may have",
                    retry_after_s=1.0,
                )
            )

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.front.connections.discard(self)
        self.connections.discard(self)
        waiting = [cycle for cycle, _ in self.pipeline]
        for cycle in [self.active, self.incoming, self.cycle, *waiting]:
            if isinstance(cycle, Exchange):
                cycle.disconnect()
            elif cycle is not None:
                cycle.disconnected = not cycle.response_complete
                cycle.message_event.set()
        self.pipeline.clear()
        self._dead = True
        self.flow.resume_writing()
        # Parser and exchange refer back to the connection; request bodies hang on them.
        self.active = self.incoming = self._known = None
        self.cycle = self.parser = None  # type: ignore[assignment]

    @override
    def data_received(self, data: bytes) -> None:
        if self._dead:
            return
        resting = not self._receiving and not self._loose_bytes
        known = self._known
        if (
            resting
            and known is not None
            and known.asked is self.front.routes.headers
            and known.fits(data)
        ):
            self._since = self.front.clock
            exchange = known.exchange(self, data)
            self.cycle = exchange  # type: ignore[assignment]
            self.start_or_queue(exchange)
            return
        # A head is in one piece of data, or in several that have been counted.
        self._received = self._loose_bytes + len(data)
        self._loose_bytes = self._received
        self._begun = 0
        self._parse([data])
        if resting and self._begun == 1 and not self._receiving:
            self._known = know_head(data, self.cycle, self._body_bytes)
        if self._receiving and not self._in_head:
            self._receive_rest()
        limit = self.front.limits.max_header_bytes
        if self._loose_bytes > limit and not self._dead:
            what = "head" if self._in_head else "chunk framing or trailers"
            self.refuse(errors.HeadersTooLarge(f"the request's {what} exceeds {limit} bytes"))

    def _receive_rest(self) -> None:
        """Take a large rest of the body past the parser, if it is this request's turn."""
        exchange = self.incoming
        if not isinstance(exchange, Exchange) or exchange is not self.active or self._dead:
            return
        if exchange.headers.content_length - self._body_bytes >= MIN_UPLOAD_BYTES:
            Upload(self, exchange)

    def upload_ended(self) -> None:
        """The body is complete, or refused. The parser, still in its midst, is of no more use."""
        if not self._dead:
            self.parser = httptools.HttpRequestParser(self)
            self.on_message_complete()

    def _parse(self, pieces: list[bytes | memoryview]) -> None:
        while pieces and not self._dead:
            data = pieces.pop()
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                pieces.append(memoryview(data)[upgrade.args[0] :])
                self._decline_upgrade(pieces)
            except httptools.HttpParserCallbackError as error:
                log.error("a request could not be handled", exc_info=error.__context__)
                self._dead = True
                self.transport.abort()
            except httptools.HttpParserError as error:
                if not self._dead:
                    self.refuse(errors.InvalidRequest(f"malformed HTTP: {error}"))

    def _decline_upgrade(self, pieces: list[bytes | memoryview]) -> None:
        """Serve the request in HTTP/1.1: no upgrade is offered, so its header has no meaning.

        RFC 9110 §7.8. The parser takes what follows such a head for the other protocol; so it is
        given the head again, without that header, before the rest.
        """
        self._upgrading = False
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.refuse(errors.MethodNotAllowed("this server is no proxy: CONNECT is not allowed"))
            return
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (method, self.url, version)]
        lines += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        pieces.append(b"".join([*lines, b"\r\n"]))

    # Parser events.

    @override
    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self.incoming = None
        self._receiving = True
        self._in_head = True
        self._begun += 1
        self._body_bytes = 0
        self._since = self.front.clock

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # and not a trailer
            self.headers.append((name.lower(), value))

    @override
    def on_headers_complete(self) -> None:
        self._in_head = False
        self._loose_bytes = 0
        if self._dead:
            return
        parser = self.parser
        if parser.should_upgrade():
            self._upgrading = True
            return
        limit = self.front.limits.max_header_bytes
        if self._received > limit and self._head_size() > limit:
            self.refuse(errors.HeadersTooLarge(f"the request's head exceeds {limit} bytes"))
            return
        if fault := host_fault(self.headers, parser.get_http_version()):
            self.refuse(errors.InvalidRequest(f"malformed HTTP: {fault}"))
            return
        if parser.get_method() == b"POST":
            if self.url in self.front.routes.infer_paths:
                self._begin_exchange(self.url)
                return
            path = self.url.partition(b"?")[0]
            if b"%" in path or path[:1] != b"/":
                path = normal_path(path)
            if path.startswith(_PREFIX) and path.endswith(_SUFFIX):
                self._begin_exchange(path)
                return
        self._begin_asgi()

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _begin_exchange(self, path: bytes) -> None:
        modern = self.parser.get_http_version() == "1.1"
        headers = RequestHeaders(self.headers, self.front.routes.headers, modern=modern)
        exchange = Exchange(self, path, modern and self.parser.should_keep_alive(), headers)
        self.incoming = exchange
        self.cycle = exchange  # type: ignore[assignment]
        if headers.content_length > self.front.limits.max_body_bytes:
            self._refuse_body()
            return
        if (tenants := self.front.tenants) is not None:
            try:
                headers.tenant = tenants.identify(self.headers)
            except errors.ServingError as error:
                # At once: nobody's body is not waited for.
                self.refuse(error)
                return
        self.start_or_queue(exchange)
        if headers.expect_continue and exchange is self.active:
            self.transport.write(CONTINUE)

    def _begin_asgi(self) -> None:
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url if url.startswith(b"/") else origin_form(url)
        self.headers = self.scope["headers"] = headers
        for name, value in headers:
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = self.parser.get_http_version() != "1.0"
            elif name == b"content-length" and int(value) > self.front.limits.max_body_bytes:
                self._refuse_body()
                return
        try:
            super().on_headers_complete()
            self.incoming = self.cycle
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            self.refuse(
                errors.InvalidRequest("malformed HTTP: the request target is not a valid URL")
            )

    @override
    def on_body(self, body: bytes) -> None:
        if self._dead:
            return
        self._loose_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes > self.front.limits.max_body_bytes:
            self._refuse_body()
        elif isinstance(self.incoming, Exchange):
            self.incoming.add(body)
        else:
            super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._receiving = False
        self._in_head = True
        if self._dead or self._upgrading:
            return
        request, self.incoming = self.incoming, None
        if not isinstance(request, Exchange):
            super().on_message_complete()
            return
        request.received = True
        if request is self.active:
            request.run()

    # Refusals.

    def refuse(self, error: Exception) -> None:
        """Answer the message being received with an error, in its turn, and close."""
        self._dead = True
        incoming, self.incoming = self.incoming, None
        exchange = incoming if isinstance(incoming, Exchange) else None
        if exchange is None:
            exchange = Exchange(self, b"", keep_alive=False)
        exchange.refuse(error)
        if exchange is self.active:
            exchange.run()
        elif incoming is None or self._replace(incoming, exchange):
            self.cycle = exchange  # type: ignore[assignment]
            self.start_or_queue(exchange)

    def _replace(self, incoming: Exchange | RequestResponseCycle, exchange: Exchange) -> bool:
        """Put `exchange` where `incoming` waits, or return True if it has no place yet."""
        for i, (waiting, app) in enumerate(self.pipeline):
            if waiting is incoming:
                self.pipeline[i] = (exchange, app)
                self.cycle = exchange  # type: ignore[assignment]
                return False
        if isinstance(incoming, Exchange):
            return True
        if incoming.response_complete:
            self.end()
            return False
        if incoming.response_started:
            self.transport.close()
            return False
        # Starlette has begun and waits for the body: it is told that the client is gone.
        incoming.disconnected = True
        incoming.message_event.set()
        self.active = None
        return True

    def _refuse_body(self) -> None:
        limit = self.front.limits.max_body_bytes
        self.refuse(errors.PayloadTooLarge(f"the request body exceeds {limit} bytes"))
