"""What the headers of an inference request say."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from serving.errors import InvalidRequest
from serving.gateway.infer import MAX_TIMEOUT_S
from serving.tenant_settings import DEFAULT_TENANT

COOKIE: Final = b"cookie"
_MAX_ID: Final = 128
_READ: Final = frozenset(
    {
        b"content-length",
        b"inference-header-content-length",
        b"x-request-id",
        b"accept-encoding",
        b"content-encoding",
        b"x-request-timeout-ms",
        b"expect",
    }
)
BAD_REQUEST_ID: Final = f"header x-request-id must be 1 to {_MAX_ID} printable ASCII characters"
_NONE: Final[Mapping[bytes, bytes]] = {}


class RequestHeaders:
    """The headers that matter, as they came: they are checked when it is their request's turn.

    `routing` are those that the route table asks for, `tenant` is whose the request is. Shared by
    requests with the same head.
    """

    __slots__ = (
        "accept_encoding",
        "content_encoding",
        "content_length",
        "expect_continue",
        "given_id",
        "json_length",
        "routing",
        "tenant",
        "timeout",
    )

    def __init__(
        self,
        headers: Sequence[tuple[bytes, bytes]] = (),
        asked: Collection[bytes] = (),
        *,
        modern: bool = True,
    ) -> None:
        """Names are lower-case; `asked` are those that the route table asks for.

        `modern` is HTTP/1.1; before it there is no `Expect`.
        """
        self.content_length = 0
        self.expect_continue = False
        self.content_encoding = b""
        self.accept_encoding = b""
        self.json_length: bytes | None = None
        self.given_id: bytes | None = None
        self.timeout: bytes | None = None
        self.routing: Mapping[bytes, bytes] = _NONE
        self.tenant = DEFAULT_TENANT
        if asked:
            self.routing = {name: value for name, value in headers if name in asked}
            if COOKIE in self.routing:
                # HTTP/2 clients, and proxies before us, send each cookie in a header of its own.
                self.routing[COOKIE] = b"; ".join(v for name, v in headers if name == COOKIE)
        for name, value in headers:
            if name not in _READ:
                continue
            if name == b"content-length":
                self.content_length = int(value)  # the parser has checked it
            elif name == b"inference-header-content-length":
                self.json_length = value
            elif name == b"x-request-id":
                self.given_id = value
            elif name == b"accept-encoding":
                self.accept_encoding = value
            elif name == b"content-encoding":
                self.content_encoding = value
            elif name == b"x-request-timeout-ms":
                self.timeout = value
            elif name == b"expect" and value.lower() == b"100-continue":
                self.expect_continue = modern


NO_HEADERS: Final = RequestHeaders()


def parse_timeout(value: bytes) -> float:
    """The seconds that x-request-timeout-ms allows. Raises `InvalidRequest`."""
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds <= MAX_TIMEOUT_S * 1e3:
        raise InvalidRequest(
            f"header x-request-timeout-ms is {value[:40].decode('latin-1')!r}; "
            f"expected milliseconds, more than 0 and at most {MAX_TIMEOUT_S * 1e3:.0f}"
        )
    return milliseconds * 1e-3


def is_request_id(value: bytes) -> bool:
    """Whether a reply can carry it as its id."""
    return 0 < len(value) <= _MAX_ID and value.isascii() and value.decode().isprintable()
