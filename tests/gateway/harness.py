"""A gateway without Ray: the real server on a loop of its own thread, real replicas beside it.

Only the controller is a stand-in: the port that a gateway asks for routes and reports to.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from serving import tls
from serving.config import GatewayConfig
from serving.core.routing import Arm, Endpoint, ModelRoute, RouteTable, Split
from serving.core.types import Signature
from serving.errors import ClusterError
from serving.gateway.batcher import ArmBatcher
from serving.gateway.http import HttpConnection
from serving.gateway.server import GatewayServer
from serving.replica.backends.base import Backend
from serving.replica.engine import Engine
from serving.replica.rules import rules_for
from serving.replica.server import ReplicaServer, TlsListener
from serving.tenant_settings import TenantsConfig
from tests.gateway.client import Client

T = TypeVar("T")
NODE = "node-1"
DIGEST = "sha256:" + "0" * 64
# Long enough for a loaded machine; a condition that holds ends the wait at once.
PATIENCE_S = 60.0


def eventually(condition: Callable[[], T], what: str = "") -> T:
    """The first true value of `condition`, polled."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, what or "a condition that should come true"
        pause.wait(0.002)


class StubController:
    """Hands out one table, keeps what is reported; `away` makes every call fail."""

    def __init__(self) -> None:
        self.table = RouteTable()
        self.reports: list[dict[str, Any]] = []
        # What a report is answered with.
        self.answer: dict[str, Any] | None = None
        self.away = False
        self.certificates: Path | None = None
        self._changed = asyncio.Event()

    async def call(self, method: str, *args: Any, timeout_s: float = 5.0) -> Any:
        if self.away:
            raise ClusterError("the controller is away")
        if method == "report":
            self.reports.append(args[0])
            return self.answer
        if method == "issue_certificate":
            if self.certificates is None:
                raise ClusterError("there is no certificate to be had")
            ca = tls.ensure_ca(self.certificates)
            cert = tls.sign_csr(self.certificates, args[0].encode())
            return {"cert": cert.decode(), "ca": ca.decode()}
        assert method == "poll_routes"
        _, revision, wait_s = args
        try:
            async with asyncio.timeout(wait_s):
                while self.table.revision <= revision:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return None
        return self.table.to_dict()

    async def call_patiently(self, method: str, *args: Any, patience_s: float) -> Any:
        return await self.call(method, *args)

    def publish(self, table: RouteTable) -> None:
        self.table = table
        self._changed.set()


class Gateway:
    """A `GatewayServer` on a loop of its own. `with Gateway(keep_alive_s=1) as gateway: …`."""

    def __init__(
        self,
        loop_factory: Callable[[], Any] = uvloop.new_event_loop,
        tenants: TenantsConfig | None = None,
        **config: Any,
    ) -> None:
        self.tenants = tenants
        self.config = GatewayConfig(port=0, **config)
        self.controller = StubController()
        self.left: list[str] = []
        self._factory = loop_factory
        self._started = threading.Event()
        self._revisions = itertools.count(1)
        self._thread = threading.Thread(target=self._main, name="gateway", daemon=True)
        self._failure: BaseException | None = None

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._factory) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        # What a callback raises is a failure of the test, not a line in a log.
        self.loop.set_exception_handler(self._note)
        self.server = GatewayServer(
            self.config,
            gateway="gateway-test",
            node=NODE,
            controller=self.controller,
            tick_s=3600,
            tenants=self.tenants,
        )
        await self.server.start()
        self.stopping = asyncio.Event()
        self._started.set()
        await self.stopping.wait()
        await self.server.stop()
        me = asyncio.current_task()
        self.left += [str(task) for task in asyncio.all_tasks() if task is not me]
        scheduled = getattr(self.loop, "_scheduled", ())  # asyncio's own loop tells its timers
        self.left += [str(handle) for handle in scheduled if not handle.cancelled()]

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.left.append(f"{context['message']}: {context.get('exception')!r}")

    def start(self) -> Gateway:
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def begin_stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.stopping.set)

    def wait_stopped(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the gateway did not stop"
        if self._failure is not None:
            raise self._failure
        assert not self.left, self.left

    def stop(self) -> None:
        self.begin_stop()
        self.wait_stopped()

    def __enter__(self) -> Gateway:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, function: Callable[[], T]) -> T:
        """`function`, called on the gateway's loop."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE_S)

    def until(self, condition: Callable[[], T], what: str = "") -> T:
        """`eventually` with `condition` called on the gateway's loop."""
        return eventually(lambda: self.run(condition), what)

    @property
    def port(self) -> int:
        return self.server.port

    def connect(self, receive_buffer: int = 0) -> Client:
        return Client(self.port, receive_buffer)

    def connection(self, client: Client) -> HttpConnection:
        """The gateway's side of a client's connection."""
        name = client.sock.getsockname()

        def find() -> HttpConnection | None:
            connections = self.server.front.connections
            return next((c for c in connections if c.client == name), None)

        found = self.until(find, "a connection")
        assert found is not None
        return found

    def batcher(self, model: str, version: str | None = None) -> ArmBatcher:
        return self.server.routes.arm(model, version)

    def outcomes(self, model: str, version: str | None = None) -> dict[str, int]:
        return self.run(lambda: dict(self.batcher(model, version).recorder.outcomes))

    def publish(
        self,
        *arms: Arm,
        default: dict[str, str] | None = None,
        ready: bool = True,
        complete: bool = True,
        split: Split | None = None,
    ) -> None:
        """Put a table of these versions in force; the first of a model is its default.

        A `split` is for the first version's model.
        """
        models: dict[str, ModelRoute] = {}
        for arm in arms:
            route = models.setdefault(arm.model, ModelRoute(arm.model, arm.version, {}))
            models[arm.model] = ModelRoute(
                arm.model,
                (default or {}).get(arm.model, route.version),
                {**route.arms, arm.version: arm},
            )
        if split is not None:
            first = models[arms[0].model]
            models[first.name] = ModelRoute(first.name, first.version, first.arms, split)
        table = RouteTable(next(self._revisions), models, complete)
        self.run(lambda: self.controller.publish(table))
        self.until(lambda: self.server.routes.table.revision == table.revision, "the new table")
        if ready:
            self.until(lambda: all(self._connected(arm) for arm in arms), "connected replicas")

    def _connected(self, arm: Arm) -> bool:
        batcher = self.batcher(arm.model, arm.version)
        listed = all(e in batcher.links and batcher.links[e].up for e in arm.endpoints)
        return listed and batcher.replicas_connected == len(arm.endpoints)


def arm(
    model: str,
    replicas: Iterable[Replica | ReplicaProcess],
    *,
    version: str = "1",
    of: Signature | None = None,
    **limits: Any,
) -> Arm:
    """A version answered by these replicas."""
    replicas = list(replicas)
    return Arm(
        model,
        version,
        limits.pop("digest", DIGEST),
        "test",
        of or replicas[0].signature,
        tuple(r.endpoint for r in replicas),
        **limits,
    )


class Replica:
    """A real frame server over `backend`, in this process."""

    def __init__(
        self,
        backend: Backend,
        directory: Path,
        name: str = "r1",
        *,
        max_size: int = 64,
        listener: TlsListener | None = None,
    ) -> None:
        self.backend = backend
        self.signature = backend.signature
        path = str(directory / f"{name}.sock")
        self.endpoint = Endpoint(name, NODE, path)
        self.server = ReplicaServer(
            Engine(backend, rules_for(backend, max_size, None)),
            path,
            {"model": "m", "version": "1", "digest": DIGEST, "replica": name},
            listener,
        )
        self.server.start()
        if self.server.tcp_address is not None:
            self.endpoint = Endpoint(name, "another node", path, self.server.tcp_address)

    def stop(self) -> None:
        self.server.stop()


NewReplica = Callable[[str], Replica]
"""What the fixture `new` gives: starts a replica of that name."""


class ReplicaProcess:
    """The same over a `ScriptedBackend` in a process of its own, to be killed."""

    def __init__(self, signature: Signature, directory: Path, name: str) -> None:
        self.signature = signature
        self.endpoint = Endpoint(name, NODE, str(directory / f"{name}.sock"))
        self._command = [
            sys.executable,
            "-m",
            "tests.gateway.replica_process",
            json.dumps({"path": self.endpoint.unix, "signature": signature.to_dict()}),
        ]
        self.start()

    def start(self) -> None:
        """Start it, again after its death too: at the same path."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.read() == "up"

    def read(self) -> str:
        """The next line that the process prints: "up", then "run" at each run of its model."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        assert ready, "the replica said nothing"
        return self.process.stdout.readline().strip()

    def command(self, word: str) -> None:
        """Shut or open the gate."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        assert self.read() == word

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        if not self.dead:
            self.process.kill()
        self.process.communicate()
