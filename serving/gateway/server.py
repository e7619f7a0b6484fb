"""A gateway without Ray: listener, routes, pipeline, and the loops that talk to the controller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import psutil
import uvicorn

from serving import tls
from serving.config import GatewayConfig
from serving.core.inference import Limits
from serving.core.routing import RouteTable
from serving.errors import ClusterError
from serving.gateway.app import create_app
from serving.gateway.front import HttpFront, HttpLimits
from serving.gateway.infer import Pipeline
from serving.gateway.recorder import ROWS_BOUNDS, SECONDS_BOUNDS
from serving.gateway.routes import Routes
from serving.gateway.tenants import tenants_of
from serving.tenant_settings import TenantsConfig

log = logging.getLogger(__name__)

_POLL_S: Final = 10.0
_ANSWER_S: Final = 5.0
_BACKOFF_S: Final = 0.25
_BACKLOG: Final = 2048
# At a forced shutdown, how long clients have to take the errors that they are sent.
_FAREWELL_S: Final = 0.5


class Controller(Protocol):
    """What a gateway asks of the controller."""

    async def call(self, method: str, *args: Any, timeout_s: float = ...) -> Any:
        """One call. Raises `ClusterError` if there is no answer in time."""

    async def call_patiently(self, method: str, *args: Any, patience_s: float) -> Any:
        """`call`, again and again until it succeeds or `patience_s` seconds passed."""


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers: the process belongs to Serve."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatewayServer:
    """One gateway process's parts. `start`, then `stop`; everything runs on one loop."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        gateway: str,
        node: str,
        controller: Controller,
        tick_s: float,
        tenants: TenantsConfig | None = None,
    ) -> None:
        """`tenants` of None are the defaults."""
        self._config = config
        self._tenants = tenants or TenantsConfig()
        self._gateway = gateway
        self._node = node
        self._controller = controller
        self._tick_s = tick_s
        self._started_at = time.time()
        self._tls: ssl.SSLContext | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._report_now = asyncio.Event()
        # Of labels that the controller sent: the requests that were answered here.
        self._joined: list[str] = []

    async def start(self) -> None:
        """Take the routes that there are, and listen.

        Raises `ClusterError` when the port is taken.
        """
        self._build(asyncio.get_running_loop())
        listener = _bind(self._config.host, self._config.port)
        self.port: int = listener.getsockname()[1]
        # One that takes another's place knows all models before its first client comes.
        with contextlib.suppress(ClusterError):
            await self._take_routes(0.0)
        with _explained(self._config.host, self._config.port):
            listener.listen(_BACKLOG)
        self.front.sweep()
        self._uvicorn = self._http_server()
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
        self._tasks = [
            asyncio.create_task(self._poll(), name="routes"),
            asyncio.create_task(self._report_forever(), name="reports"),
        ]

    def _build(self, loop: asyncio.AbstractEventLoop) -> None:
        """Put the parts of the data plane together."""
        config = self._config
        limits = Limits(
            max_json_depth=config.max_json_depth,
            max_json_bytes=config.max_json_bytes,
            max_elements=config.max_elements,
        )
        tenants = tenants_of(self._tenants)
        self.routes = Routes(
            gateway=self._gateway,
            node=self._node,
            limits=limits,
            tls=self._tls_context,
            loop=loop,
            tenant=self._tenants.default if tenants is None else None,
        )
        self.pipeline = Pipeline(loop, self.routes.batchers)
        self.routes.watch = self.pipeline.watch
        self.routes.breaker_opened = self._report_now.set
        self.routes.wake = self._report_now.set
        self.front = HttpFront(
            self.pipeline,
            self.routes,
            HttpLimits(
                config.max_body_bytes,
                config.max_header_bytes,
                config.max_held_bytes,
                config.max_connections,
                config.keep_alive_s,
                config.read_timeout_s,
                config.write_timeout_s,
            ),
            loop,
            request_id_prefix=f"{self._gateway[-8:]}-",
            tenants=tenants,
        )

    def _http_server(self) -> _Uvicorn:
        return _Uvicorn(
            uvicorn.Config(
                create_app(self.routes, self._config.server_name),
                http=self.front.protocol(),  # type: ignore[arg-type]
                ws="none",
                access_log=False,
                # Logging is the process's own: see serving.logs.
                log_config=None,
                log_level="warning",
                lifespan="off",
                server_header=False,
                backlog=_BACKLOG,
            )
        )

    @property
    def alive(self) -> bool:
        """Whether the listener and both loops run."""
        return not self._serving.done() and not any(t.done() for t in self._tasks)

    async def stop(self) -> None:
        """Stop listening, answer what was admitted within `drain_s`, report once more, close."""
        self._uvicorn.should_exit = True
        self.routes.stop_shadows()
        # uvicorn closes the listener and idle connections, and waits for those that are not.
        await asyncio.wait([self._serving], timeout=self._config.drain_s)
        if not self._serving.done():
            log.warning("requests were still in flight after %.1f s", self._config.drain_s)
            self.pipeline.give_up()
            await asyncio.wait([self._serving], timeout=_FAREWELL_S)
            self._uvicorn.force_exit = True
            self.front.abort()
            await asyncio.wait([self._serving], timeout=_FAREWELL_S)
        tasks = [self._serving, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(ClusterError):
            await self._report()
        self.pipeline.close()
        self.front.close()
        await self.routes.close()

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            raise ConnectionError("this gateway has no certificate of the cluster yet")
        return self._tls

    async def _poll(self) -> None:
        """Follow the route table. Without a controller the last one stays in force."""
        await _repeat(lambda: self._take_routes(_POLL_S), "route table")

    async def _take_routes(self, wait_s: float) -> None:
        """Apply a table that is newer than ours. Raises `ClusterError` without a controller."""
        raw = await self._controller.call(
            "poll_routes",
            self._gateway,
            self.routes.table.revision,
            wait_s,
            timeout_s=wait_s + _ANSWER_S,
        )
        if raw is not None:
            table = RouteTable.from_dict(raw)
            if self._tls is None and _leaves_node(table, self._node):
                await self._get_certificate()
            self.routes.apply(table)
            # Some wait for the last gateway to have it.
            self._report_now.set()

    async def _get_certificate(self) -> None:
        key, csr = await asyncio.to_thread(tls.make_csr)
        issued = await self._controller.call("issue_certificate", csr.decode())
        self._tls = tls.client_context(key, issued["cert"].encode(), issued["ca"].encode())

    async def _report_forever(self) -> None:
        async def once() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await self._report_now.wait()
            self._report_now.clear()
            await self._report()

        await _repeat(once, "report")

    async def _report(self) -> None:
        """Report, and take what the controller answers with: labels, and who may not spend more.

        It sends a label until it hears that it was joined, so an answer that is lost does no harm.
        """
        payload = self.report()
        answer = await self._controller.call("report", payload)
        self.routes.heard()
        del self._joined[: len(payload["feedback_joined"])]
        if isinstance(answer, Mapping):
            self._joined += self.routes.feedback(answer.get("feedback") or ())
            if self.front.tenants is not None and "spent" in answer:
                self.front.tenants.spent(answer["spent"])

    def report(self) -> Mapping[str, Any]:
        """Totals since start and gauges, in plain JSON types."""
        return {
            "gateway": self._gateway,
            "node": self._node,
            "pid": os.getpid(),
            "rss_bytes": psutil.Process().memory_info().rss,
            "revision": self.routes.table.revision,
            "started_at": self._started_at,
            "connections": len(self.front.connections),
            "unrouted": dict(self.front.unrouted),
            "models": self.routes.report(),
            "usage": self.routes.report_usage(),
            "rollouts": self.routes.report_rollouts(),
            "feedback_joined": list(self._joined),
            "bounds": {"seconds": list(SECONDS_BOUNDS), "rows": list(ROWS_BOUNDS)},
        }


async def _repeat(once: Callable[[], Awaitable[None]], what: str) -> None:
    """Do it for ever; an absent controller is a pause, logged when it begins and when it ends."""
    failing = False
    while True:
        try:
            await once()
        except ClusterError as error:
            if not failing:
                log.warning("%s: %s; going on with what is known", what, error)
            failing = True
            await asyncio.sleep(_BACKOFF_S)
        else:
            if failing:
                log.warning("%s: the controller is back", what)
            failing = False


def _leaves_node(table: RouteTable, node: str) -> bool:
    return any(
        endpoint.node != node
        for model in table.models.values()
        for arm in model.arms.values()
        for endpoint in arm.endpoints
    )


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has its port; until it listens, other gateways on it get all connections."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        with _explained(host, port):
            listener.bind((host, port))
    except ClusterError:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _explained(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClusterError(f"cannot listen on {host}:{port}: {error.strerror}") from error
