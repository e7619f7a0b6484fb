"""One HTTP request to a service outside: bounded in time and size, to the host it was meant for.

Standard library, blocking: for a thread of its own. The time limit is for the whole exchange, so a
service that answers a byte a second is a service that does not answer. Proxies of the environment
are not used. Errors name scheme, host and port alone: paths and queries may hold secrets.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from serving import __version__
from serving.core.urls import place
from serving.errors import first_line

MAX_ANSWER: Final = 256 * 1024
"""Bytes of body that are read at most."""
_MAX_REDIRECTS: Final = 3
# Only these may be followed without a change of method.
_REDIRECTS: Final[Mapping[str, frozenset[int]]] = {
    "GET": frozenset({301, 302, 307, 308}),
    "POST": frozenset({307, 308}),
}


class NoAnswer(Exception):
    """There is no answer that can be used. `str(error)` is a sentence without secrets."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer of at most `MAX_ANSWER` bytes."""

    status: int
    body: bytes
    location: str = ""

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300


def fetch(
    method: str,
    url: str,
    *,
    timeout_s: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send one request and read its answer, whatever its status. Blocks for `timeout_s` at most.

    Only the look-up of a host name has the system's own time limit. Raises `NoAnswer` for a URL
    that is not plain http or https, a service that cannot be reached or is late, an answer that is
    no HTTP or too large, and a redirect to another host.
    """
    deadline = time.monotonic() + timeout_s
    sent = {"User-Agent": f"serving/{__version__}", **(headers or {})}
    for _ in range(1 + _MAX_REDIRECTS):
        answer = _exchange(method, url, body, sent, deadline, timeout_s)
        if answer.status not in _REDIRECTS.get(method, ()) or not answer.location:
            return answer
        url = _redirected(url, answer.location)
    raise NoAnswer(f"{place(url)} redirects more than {_MAX_REDIRECTS} times")


def _redirected(url: str, location: str) -> str:
    target = urljoin(url, location)
    if place(target) != place(url):
        raise NoAnswer(f"{place(url)} redirects to {place(target)}, which is not followed")
    return target


def _exchange(
    method: str,
    url: str,
    body: bytes | None,
    headers: Mapping[str, str],
    deadline: float,
    timeout_s: float,
) -> Answer:
    where = place(url)
    connection = _connection(url)
    target = urlsplit(url)._replace(scheme="", netloc="", fragment="").geturl() or "/"
    try:
        connection.timeout = _left(deadline)
        connection.connect()
        connection.sock.settimeout(_left(deadline))
        connection.request(method, target, body=body, headers=dict(headers))
        return _read(connection.sock, method, deadline)
    except TimeoutError as error:
        raise NoAnswer(f"{where} did not answer within {timeout_s:g} s") from error
    except OSError as error:
        raise NoAnswer(
            f"{where} cannot be reached: {error.strerror or first_line(error)}"
        ) from error
    except _TooLarge as error:
        raise NoAnswer(f"{where} answered with more than {MAX_ANSWER // 1024} KiB") from error
    except (http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"{where} sent no complete HTTP answer") from error
    finally:
        connection.close()


def _connection(url: str) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise NoAnswer("the URL is malformed") from error
    if parts.scheme not in ("http", "https") or not host or not _printable(parts):
        raise NoAnswer("the URL must be http://HOST or https://HOST, in printable ASCII")
    if parts.username is not None or parts.password is not None:
        raise NoAnswer(f"the URL of {place(url)} holds a user name; use secret_env instead")
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, port, context=_tls())
    return http.client.HTTPConnection(host, port)


def _printable(parts: SplitResult) -> bool:
    return all("!" <= character <= "~" for character in parts.geturl())


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _TooLarge(Exception):
    pass


def _read(sock: socket.socket, method: str, deadline: float) -> Answer:
    source = cast(socket.socket, _Source(sock, deadline))
    with http.client.HTTPResponse(source, method=method) as response:
        response.begin()
        body = response.read(MAX_ANSWER + 1)
        if len(body) > MAX_ANSWER:
            raise _TooLarge
        if response.length:  # cut short, which http.client passes off as complete
            raise http.client.IncompleteRead(body, response.length)
        return Answer(response.status, body, response.headers.get("Location", ""))


class _Readable(Protocol):
    def settimeout(self, value: float | None, /) -> None: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...


class _Source(io.RawIOBase):
    """A socket's bytes until a deadline, however slowly they come."""

    def __init__(self, sock: _Readable, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        """As `http.client` opens its socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)
