"""The Ray Serve deployment of one model replica: supervision only, tensors go by socket.

Life: make sure of the artifact → load, warm up and golden check on a thread → listen → announce to
the controller every two seconds → serve until Serve stops it → announce "draining", finish what is
in flight, close.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psutil
import ray
from ray import serve

from serving.control_link import CONTROLLER_APP, ControlLink
from serving.core.replica import ReplicaSpec
from serving.errors import ServingError
from serving.replica.control import Announcer, ArtifactFetcher
from serving.replica.engine import Engine
from serving.replica.loading import load_engine
from serving.replica.server import ReplicaServer, TlsListener
from serving.replica.watchdog import Watchdog

_DRAIN_LIMIT_S: Final = 10.0
_ANNOUNCE_PATIENCE_S: Final = 10.0
_DRAIN_ANNOUNCE_PATIENCE_S: Final = 1.0
_CERTIFICATE_PATIENCE_S: Final = 60.0

_log = logging.getLogger(__name__)


@serve.deployment
class ModelReplica:
    """One process that holds one version of one model. `spec` is `ReplicaSpec.to_dict()`."""

    async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._spec = ReplicaSpec.from_dict(spec)
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._node = ray.get_runtime_context().get_node_id()
        self._state, self._error, self._load_s = "ready", None, 0.0
        self._engine: Engine | None = None
        self._server: ReplicaServer | None = None
        self._link = ControlLink(lambda: serve.get_app_handle(CONTROLLER_APP))
        self._announcer = Announcer(self._link, self._info)
        try:
            await self._load()
        except Exception as error:
            # Serve will report that the constructor failed; why must reach the operator as one
            # sentence.
            known = isinstance(error, ServingError)
            self._state, self._error = "failed", str(error) if known else repr(error)
            await self._announcer.tell(_ANNOUNCE_PATIENCE_S)
            raise
        self._announcer.start()

    async def check_health(self) -> None:
        """Serve's health check. Raises `RuntimeError` if no batch can reach this replica."""
        if self._server is None or not self._server.listening:
            raise RuntimeError("the frame server does not listen")

    async def __del__(self) -> None:
        """Serve calls this once, before it ends the process."""
        if self._server is None:
            return
        self._state = "draining"
        await self._announcer.stop()
        await self._announcer.tell(_DRAIN_ANNOUNCE_PATIENCE_S)
        await asyncio.to_thread(self._server.drain, _DRAIN_LIMIT_S)
        self._watchdog.stop()
        self._server.stop()

    async def _load(self) -> None:
        started = time.monotonic()
        spec = self._spec
        fetch = ArtifactFetcher(self._link, spec.digest, asyncio.get_running_loop())
        self._engine = await asyncio.to_thread(load_engine, spec, fetch)
        self._load_s = time.monotonic() - started
        identity = {
            "model": spec.model,
            "version": spec.version,
            "digest": spec.digest,
            "replica": self._replica,
        }
        tls = await self._tls() if spec.listen_tcp else None
        # A socket path has at most 107 characters, a replica id may have more.
        short = hashlib.sha256(self._replica.encode()).hexdigest()[:16]
        server = ReplicaServer(self._engine, Path(spec.run_dir) / f"r-{short}.sock", identity, tls)
        server.start()
        self._server = server
        self._watchdog = Watchdog(self._engine, spec.stall_timeout_s)
        self._watchdog.start()

    async def _tls(self) -> TlsListener:
        """A listener for other nodes; the key is made here and never leaves the process."""
        # Most replicas never leave their node, and cryptography is some megabytes.
        from serving import tls

        key, csr = await asyncio.to_thread(tls.make_csr)
        issued = await self._link.call_patiently(
            "issue_certificate", csr.decode(), patience_s=_CERTIFICATE_PATIENCE_S
        )
        context = tls.server_context(key, issued["cert"].encode(), issued["ca"].encode())
        host = self._spec.node_host or ray.util.get_node_ip_address()
        return TlsListener(host, context)

    def _info(self) -> dict[str, Any]:
        backend = self._engine.backend if self._engine is not None else None
        server = self._server
        return {
            "replica": self._replica,
            "app": self._spec.app,
            "model": self._spec.model,
            "version": self._spec.version,
            "digest": self._spec.digest,
            "node": self._node,
            "unix": server.unix_path if server is not None else None,
            "tcp": server.tcp_address if server is not None else None,
            "pid": os.getpid(),
            "device": backend.device if backend is not None else None,
            "platform": backend.platform if backend is not None else None,
            "state": self._state,
            "error": self._error,
            "rss_bytes": psutil.Process().memory_info().rss,
            "load_s": self._load_s,
        }
