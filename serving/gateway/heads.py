"""Request heads that a connection has seen: what is repeated byte for byte is not parsed again.

A client that keeps its connection mostly sends one head over and over. When a piece of data begins
with the head of the last request, to the byte, and is as long as that request was, it is that
request with another body: parsed again, it would give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from serving.gateway.exchange import SMALL_BODY, Exchange
from serving.gateway.headers import RequestHeaders

if TYPE_CHECKING:
    from serving.gateway.http import HttpConnection

_HEAD_END: Final = b"\r\n\r\n"


@dataclass(slots=True)
class KnownHead:
    """The last request that came in one piece: its head, its length with the body, what it said.

    `asked` are the headers that the route table asked for when they were read.
    """

    head: bytes
    length: int
    asked: frozenset[bytes]
    path: bytes
    headers: RequestHeaders

    def fits(self, data: bytes) -> bool:
        """Whether `data`, between two requests, is one more with this head."""
        return len(data) == self.length and data.startswith(self.head)

    def exchange(self, connection: HttpConnection, data: bytes) -> Exchange:
        """The request in `data`, received whole."""
        exchange = Exchange(connection, self.path, True, self.headers)
        exchange.body = data[len(self.head) :]
        exchange.received = True
        return exchange


def know_head(data: bytes, request: object, body_bytes: int) -> KnownHead | None:
    """What to remember of `request`, which was all of `data` and nothing else.

    None unless it is for inference, its length was announced, it is small, and it leaves the
    connection open.
    """
    if not isinstance(request, Exchange) or not request.repeatable:
        return None
    if not 0 < body_bytes <= SMALL_BODY or request.headers.content_length != body_bytes:
        return None
    head = data[: data.find(_HEAD_END) + len(_HEAD_END)]
    # Blank lines may stand before a request and behind its body.
    if len(head) + body_bytes != len(data):
        return None
    asked = request.connection.front.routes.headers
    return KnownHead(head, len(data), asked, request.path, request.headers)
