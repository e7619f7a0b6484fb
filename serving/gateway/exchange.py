"""One inference request on an HTTP connection, from its headers to its reply."""

from __future__ import annotations

import http
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from serving.core.protocol import encode_error, parse_json_length
from serving.errors import InvalidRequest, PayloadTooLarge, ServingError, Unauthenticated
from serving.gateway import encoding
from serving.gateway.headers import (
    BAD_REQUEST_ID,
    NO_HEADERS,
    RequestHeaders,
    is_request_id,
    parse_timeout,
)
from serving.gateway.infer import Call, monotonic
from serving.gateway.targets import model_and_version

if TYPE_CHECKING:
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.http import HttpConnection

log = logging.getLogger(__name__)

_STATUS: Final = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in http.HTTPStatus}
_JSON: Final = b"application/json"
_BINARY: Final = b"application/octet-stream\r\ninference-header-content-length: %d"
# Replies below this are joined into one buffer; a large one is written without a copy.
_JOIN_BYTES: Final = 1 << 16
# Smaller bodies are not counted one by one: connections are.
SMALL_BODY: Final = 1 << 16

_Buffer = bytes | bytearray | memoryview
_Work = Callable[[], _Buffer]
_Then = Callable[[_Buffer], None]
_Refuse = Callable[[Exception], None]


class Exchange:
    """Request and reply. Also the `Sink` of its call.

    The first three attributes are those that uvicorn's protocol reads of its own cycles.
    """

    __slots__ = (
        "_arrival",
        "_error",
        "_held",
        "_reply_id",
        "body",
        "call",
        "connection",
        "disconnected",
        "given_id",
        "headers",
        "keep_alive",
        "path",
        "received",
        "response_complete",
    )

    def __init__(
        self,
        connection: HttpConnection,
        path: bytes,
        keep_alive: bool,
        headers: RequestHeaders = NO_HEADERS,
    ) -> None:
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = keep_alive
        self.connection = connection
        self.path = path
        self.headers = headers
        self.given_id = headers.given_id
        self.body: _Buffer = b""
        self.received = False
        self.call: Call | None = None
        self._reply_id = b""
        self._error: Exception | None = None
        self._arrival = 0.0
        self._held = 0

    @property
    def repeatable(self) -> bool:
        """Whether a later request may have the same head: it keeps the connection, has no id."""
        return (
            self.keep_alive
            and self._error is None
            and self.given_id is None
            and not self.headers.expect_continue
        )

    def add(self, piece: bytes) -> None:
        """Append to the body. Pieces may be tiny: they are not kept as objects of their own."""
        if not self.body:
            self.body = piece
        else:
            if not isinstance(self.body, bytearray):
                self.body = bytearray(self.body)
            self.body += piece
        if len(self.body) > SMALL_BODY:
            self.count(len(self.body))

    def make_room(self) -> memoryview:
        """Make the body as large as announced; returns the part of it that is still to come."""
        start = self.body
        # Zeros, which a bytearray would begin with, cost as much as a copy.
        room = memoryview(np.empty(self.headers.content_length, np.uint8))  # type: ignore[arg-type]
        room[: len(start)] = start
        self.body = room
        return room[len(start) :]

    def count(self, nbytes: int) -> None:
        """Count so much of the body among what is held, or refuse the request."""
        try:
            self._hold(nbytes)
        except ServingError as error:
            self.connection.refuse(error)

    def _hold(self, nbytes: int) -> None:
        """Count a body of `nbytes` among those held.

        Raises `Unavailable` if they are too many now, `PayloadTooLarge` if it alone is.
        """
        front = self.connection.front
        if nbytes > front.limits.max_held_bytes:
            limit = front.limits.max_held_bytes
            raise PayloadTooLarge(f"the request body exceeds {limit} bytes, all that are ever held")
        front.hold(nbytes - self._held)
        self._held = nbytes

    def _release(self) -> None:
        if self._held:
            self.connection.front.release(self._held)
            self._held = 0

    def refuse(self, error: Exception) -> None:
        """Answer with `error` when the turn comes, and close."""
        self._error = error
        self.keep_alive = False
        self.received = True
        self.body = b""
        self._release()

    def run(self) -> None:
        """It is this exchange's turn and its body is there."""
        self._arrival = monotonic()
        if self._error is not None:
            self._refuse(self._error)
            return
        body, self.body = self.body, b""
        coding = self.headers.content_encoding
        if not coding:
            self._submit(body)
            return
        name = coding.decode("latin-1")
        limit = self.connection.front.limits.max_body_bytes

        def inflate() -> _Buffer:
            return encoding.decompress(body, name, limit)

        inline = len(body) <= encoding.INLINE_INFLATE_BYTES
        self._run_work(inline, inflate, self._submit_inflated, self._refuse)

    def _submit_inflated(self, body: _Buffer) -> None:
        try:
            if len(body) > SMALL_BODY:
                self._hold(len(body))
        except ServingError as error:
            self._refuse(error)
        else:
            self._submit(body)

    def _submit(self, body: _Buffer) -> None:
        front, headers = self.connection.front, self.headers
        try:
            if front.tenants is not None:
                front.tenants.check_budget(headers.tenant)
            arm = front.routes.infer_paths.get(self.path)
            if arm is None:
                arm = front.routes.target(*model_and_version(self.path))
            json_length = parse_json_length(headers.json_length)
            timeout = None if headers.timeout is None else parse_timeout(headers.timeout)
            if self.given_id is not None and not is_request_id(self.given_id):
                raise InvalidRequest(BAD_REQUEST_ID)
            request = arm.stable.codec.decode(body, json_length)
        except Exception as error:
            self._refuse(error)
            return
        try:
            self.call = front.pipeline.submit(
                arm,
                request,
                self,
                self._arrival,
                timeout,
                headers.tenant,
                # /v2/models/M/versions/V/infer
                pinned=self.path.count(b"/") > 4,
            )
        except Exception as error:
            self._fail(error)

    def _refuse(self, error: Exception) -> None:
        """Answer with an error that was met before admission, and count it."""
        front = self.connection.front
        slug = error.slug if isinstance(error, ServingError) else ServingError.slug
        if arm := front.routes.infer_paths.get(self.path):
            arm.recorder.refused(slug, monotonic() - self._arrival)
        else:
            front.count_unrouted(slug)
        self._fail(error)

    # The sink.

    def answered(self, call: Call, answer: BatchAnswer, position: int) -> float:
        """Write the reply."""
        batcher = call.arm
        response = answer.response(position, call.request)
        price = batcher.arm.price(call.replica)
        cost = b"unpriced" if price is None else answer.cost(price, call.rows)
        now = monotonic()
        compute = answer.compute
        queue = call.sent - call.arrival + answer.queue
        json_length = response.json_length
        head = (
            b"%bcontent-type: %b\r\nx-inference-cost-usd: %b\r\n"
            b"server-timing: queue;dur=%.3f, compute;dur=%.3f, gateway;dur=%.3f\r\n"
            % (
                batcher.response_headers,
                _JSON if json_length is None else _BINARY % json_length,
                cost,
                queue * 1e3,
                compute * 1e3,
                (now - call.arrival - queue - compute) * 1e3,
            )
        )
        body = response.body
        if isinstance(body, bytes):
            parts: Sequence[_Buffer] = (body,)
            size = len(body)
        else:
            parts, size = body, response.nbytes
        if self.headers.accept_encoding and size >= encoding.MIN_COMPRESSED_BYTES:
            self._write_compressed(head, parts, size)
        else:
            self._write(200, head, parts, size)
        return now

    def failed(self, call: Call, error: ServingError) -> None:
        """Write an error reply; the call has been counted."""
        self._fail(error, call.arm.response_headers)

    def moved(self, call: Call) -> None:
        """The request is another call's now."""
        self.call = call

    def header(self, name: bytes) -> bytes | None:
        """A header that the route table asks for."""
        if name == b"x-request-id":
            return self.given_id
        return self.headers.routing.get(name)

    def reply_id(self) -> bytes:
        """The client's request id, or one of our own."""
        if not self._reply_id:
            given = self.given_id
            if given is None or not is_request_id(given):
                given = self.connection.front.next_request_id()
            self._reply_id = given
        return self._reply_id

    def disconnect(self) -> None:
        """The client is gone."""
        self.disconnected = True
        self.body = b""
        self._release()
        # The call refers back here, and holds the request.
        call, self.call = self.call, None
        if call is not None:
            call.cancel()

    # Replies.

    def _write_compressed(self, head: bytes, parts: Sequence[_Buffer], size: int) -> None:
        chosen = encoding.choose(self.headers.accept_encoding)
        if not chosen:
            self._write(200, head, parts, size)
            return
        head += b"content-encoding: %b\r\nvary: accept-encoding\r\n" % chosen.encode()

        def write(body: _Buffer) -> None:
            self._write(200, head, (body,), len(body))

        inline = size <= encoding.INLINE_DEFLATE_BYTES
        self._run_work(inline, lambda: encoding.compress(parts, chosen), write, self._fail)

    def _fail(self, error: Exception, head: bytes = b"") -> None:
        """Answer with an error; `head` says who failed, if it came that far."""
        if not isinstance(error, ServingError):
            log.error("inference failed", exc_info=error)
            error = ServingError("internal error")
        head += b"content-type: application/json\r\n"
        if (seconds := error.retry_after) is not None:
            head += b"retry-after: %d\r\n" % seconds
        if isinstance(error, Unauthenticated):
            head += b"www-authenticate: Bearer\r\n"
        body = encode_error(str(error))
        self._write(error.http_status, head, (body,), len(body))

    def _write(self, status: int, head: bytes, parts: Sequence[_Buffer], size: int) -> None:
        if self.disconnected or self.response_complete:
            return
        connection = self.connection
        front = connection.front
        head = b"%b%b%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n" % (
            _STATUS[status],
            front.date,
            head,
            self._reply_id or self.reply_id(),
            b"" if self.keep_alive else b"connection: close\r\n",
            size,
        )
        if size < _JOIN_BYTES:
            connection.transport.write(b"".join((head, *parts)))
        else:
            connection.transport.writelines((head, *parts))
        self.response_complete = True
        self.call = None
        self._release()
        if not self.keep_alive:
            connection.end()
        connection.on_response_complete()

    def _run_work(self, inline: bool, work: _Work, then: _Then, refuse: _Refuse) -> None:
        """Go on with the result of `work`: at once, or when a thread has done it."""
        if inline:
            self._work_done(work, then, refuse)
            return
        future = self.connection.front.loop.run_in_executor(None, work)
        future.add_done_callback(lambda done: self._work_done(done.result, then, refuse))

    def _work_done(self, result: _Work, then: _Then, refuse: _Refuse) -> None:
        if self.disconnected:
            return
        try:
            data = result()
        except Exception as error:
            refuse(error)
        else:
            then(data)
