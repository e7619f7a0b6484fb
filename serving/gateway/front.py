"""What all HTTP connections of a gateway share: limits, clock, request ids, and the sweep."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import TYPE_CHECKING

from serving.errors import Unavailable
from serving.gateway.http import HttpConnection
from serving.gateway.infer import Pipeline, monotonic
from serving.gateway.turns import SWEEP_S

if TYPE_CHECKING:
    from serving.gateway.routes import Routes
    from serving.gateway.tenants import Tenants


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds on one connection, and on all together. Bytes and seconds."""

    max_body_bytes: int
    max_header_bytes: int
    max_held_bytes: int
    max_connections: int
    keep_alive_s: float
    read_timeout_s: float
    write_timeout_s: float


class HttpFront:
    """The connections and what they have in common."""

    def __init__(
        self,
        pipeline: Pipeline,
        routes: Routes,
        limits: HttpLimits,
        loop: asyncio.AbstractEventLoop,
        request_id_prefix: str,
        tenants: Tenants | None = None,
    ) -> None:
        """`tenants` is None where all requests are one tenant's, without a budget."""
        self.pipeline = pipeline
        self.routes = routes
        self.limits = limits
        self.tenants = tenants
        self.loop = loop
        self.connections: set[HttpConnection] = set()
        self.unrouted: dict[str, int] = {}
        self.clock = monotonic()
        self.date = b""
        # Bytes of large request bodies that wait for their answers.
        self.held_bytes = 0
        self._request_id_prefix = request_id_prefix.encode()
        self._request_number = 0
        self._sweeper: asyncio.TimerHandle | None = None

    def protocol(self) -> Callable[..., HttpConnection]:
        """For uvicorn's `http=` setting."""
        return functools.partial(HttpConnection, self)

    def next_request_id(self) -> bytes:
        """An id for a request that brought none, unique across gateways."""
        self._request_number += 1
        return b"%b%x" % (self._request_id_prefix, self._request_number)

    def hold(self, nbytes: int) -> None:
        """Count bytes of large request bodies. Raises `Unavailable` past the limit."""
        limit = self.limits.max_held_bytes
        if self.held_bytes + nbytes > limit:
            raise Unavailable(
                f"request bodies being answered fill the {limit} bytes this gateway has for them",
                retry_after_s=1.0,
            )
        self.held_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Count bytes as gone."""
        self.held_bytes -= nbytes

    def count_unrouted(self, slug: str) -> None:
        """Count an inference request that reached no model."""
        self.unrouted[slug] = self.unrouted.get(slug, 0) + 1

    def sweep(self) -> None:
        """Enforce the time bounds, twice a second: a timer a request would cost more."""
        # First the next sweep: no failure of one connection may end them.
        self._sweeper = self.loop.call_later(SWEEP_S, self.sweep)
        self.clock = monotonic()
        self.date = b"date: " + formatdate(usegmt=True).encode() + b"\r\n"
        for connection in list(self.connections):
            connection.enforce_time_bounds(self.clock)

    def abort(self) -> None:
        """Drop every connection."""
        for connection in list(self.connections):
            connection.transport.abort()

    def close(self) -> None:
        """Stop sweeping."""
        if self._sweeper is not None:
            self._sweeper.cancel()
