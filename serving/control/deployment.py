"""The controller as a Ray Serve deployment: wires the parts, translates calls, decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import uvicorn
from ray import serve

from serving import tls
from serving.config import parse_config
from serving.control.admin import create_app
from serving.control.agents import NodeAgents
from serving.control.cluster import ServeCluster, node_labels
from serving.control.controller import Controller as Core
from serving.control.providers import Providers
from serving.control.reconcile import Clock
from serving.control.resolver import RegistryResolver
from serving.control.status import status
from serving.errors import ServingError
from serving.logs import configure_logging
from serving.store.sql import open_store

_SHUTDOWN_S = 3


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the process belongs to Serve."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@serve.deployment
class Controller:
    """One per deployment.

    `options`: config, deployment, replica_class, agent_class, run_prefix, env, listen_tcp; see the
    composition.

    The methods are what replicas and gateways call through a handle; all arguments and results are
    plain.
    """

    async def __init__(self, options: Mapping[str, Any]) -> None:  # type: ignore[misc]
        configure_logging()
        config = parse_config(options["config"], source="configuration")
        self._config = config
        store = await asyncio.to_thread(open_store, config.store_url)
        self._core = Core(
            config,
            options["deployment"],
            store=store,
            cluster=ServeCluster(options["replica_class"], options["run_prefix"], options["env"]),
            resolver=RegistryResolver(config.registry_uri, config.home_dir),
            clock=Clock(time.monotonic, time.time),
            providers=Providers,
            agents=NodeAgents(options["agent_class"], options["env"]),
            labels=node_labels,
            listen_tcp=options["listen_tcp"],
        )
        await self._core.start()
        app = create_app(self._core, host=config.control.host, ray_version=ray.__version__)
        listener = _listen(config.control.host, config.control.port)
        self._server = _Server(
            uvicorn.Config(
                app,
                access_log=False,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=_SHUTDOWN_S,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def check_health(self) -> None:
        """Serve's health check. Raises `RuntimeError` when the loop or the admin server is down."""
        if not self._core.alive or self._serving.done():
            raise RuntimeError("the controller's loop or its admin server is down")

    async def __del__(self) -> None:
        """Serve calls this once, before it ends the process."""
        core, server = getattr(self, "_core", None), getattr(self, "_server", None)
        if core is not None:
            await core.stop()
        if server is not None:
            server.should_exit = True
            await self._serving

    async def status(self) -> dict[str, Any]:
        """What runs, as GET /v1/status."""
        return status(self._core)

    async def apply(self, config: dict[str, Any], dry_run: bool) -> dict[str, Any]:
        """The plan, as POST /v1/apply; or {"error", "slug"}: an exception would lose its type."""
        try:
            return await self._core.apply(config, dry_run=dry_run, actor="serving up")
        except ServingError as error:
            return {"error": str(error), "slug": error.slug}

    async def announce(self, info: dict[str, Any]) -> None:
        """A replica is there; see `Controller.announce`."""
        self._core.announce(info)

    async def poll_routes(
        self, gateway: str, revision: int, timeout_s: float
    ) -> dict[str, Any] | None:
        """The route table once it is newer than `revision`, or None after `timeout_s` seconds."""
        table = await self._core.poll_routes(revision, timeout_s)
        return None if table is None else dict(table)

    async def report(self, payload: dict[str, Any]) -> dict[str, Any]:
        """A gateway's totals; what the gateway is told in turn, see `Controller.report`."""
        return self._core.report(payload)

    async def report_gpus(self, payload: dict[str, Any]) -> None:
        """What a node's agent found; see `Gpus.report`."""
        await self._core.gpus.report(payload)

    async def lease_gpu(self, app: str, replica: str, node: str, pid: int) -> dict[str, Any]:
        """{"lease": see `Controller.lease_gpu`}; or {"error", "slug"}, as for `apply`."""
        try:
            return {"lease": self._core.lease_gpu(app, replica, node, pid)}
        except ServingError as error:
            return {"error": str(error), "slug": error.slug}

    async def release_gpu(self, replica: str) -> None:
        """A replica is done with its share of a GPU."""
        self._core.placer.book.release(replica)

    async def manifest(self, digest: str) -> dict[str, Any]:
        """The files of an artifact."""
        return self._core.bundles.manifest(digest)

    async def read_artifact(self, digest: str, path: str, offset: int, size: int) -> bytes:
        """A part of one file of an artifact."""
        return await self._core.bundles.read(digest, path, offset, size)

    async def issue_certificate(self, csr_pem: str) -> dict[str, str]:
        """Sign a replica's or gateway's certificate request with the cluster's CA."""
        return await asyncio.to_thread(_issue, self._config.home_dir / "ca", csr_pem)


def _issue(ca_dir: Path, csr_pem: str) -> dict[str, str]:
    ca = tls.ensure_ca(ca_dir)
    return {"cert": tls.sign_csr(ca_dir, csr_pem.encode()).decode(), "ca": ca.decode()}


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host}:{port}: {error.strerror}; set control.host or control.port"
        ) from error
