"""The Ray Serve deployment of one model replica: supervision only, tensors go by socket.

Life: get a share of a GPU → make sure of the artifact → load, warm up and golden check on a
thread → listen → announce to the controller every two seconds → serve until Serve stops it →
announce "draining", finish what is in flight, close. A GPU that breaks ends the process at once:
Serve starts another.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import psutil
import ray
from ray import serve

from serving.control_link import CONTROLLER_APP, ControlLink
from serving.core.replica import ReplicaSpec
from serving.errors import DeviceError, ServingError
from serving.replica.backends.faults import FatalDeviceError
from serving.replica.control import Announcer, ArtifactFetcher, GpuShare
from serving.replica.engine import Engine, Usage
from serving.replica.leaving import LastWords
from serving.replica.loading import Loaded, load_engine
from serving.replica.server import ReplicaServer, TlsListener
from serving.replica.watchdog import Watchdog

_DRAIN_LIMIT_S: Final = 10.0
_ANNOUNCE_PATIENCE_S: Final = 10.0
_DRAIN_ANNOUNCE_PATIENCE_S: Final = 1.0
_CERTIFICATE_PATIENCE_S: Final = 60.0
_RELEASE_TIMEOUT_S: Final = 1.0

_log = logging.getLogger(__name__)


@serve.deployment
class ModelReplica:
    """One process that holds one version of one model. `spec` is `ReplicaSpec.to_dict()`."""

    async def __init__(self, spec: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._spec = ReplicaSpec.from_dict(spec)
        context = serve.get_replica_context()
        self._replica, self._seat = context.replica_id.unique_id, context.app_name
        self._node = ray.get_runtime_context().get_node_id()
        self._state, self._error, self._load_s = "ready", None, 0.0
        self._started = time.monotonic()
        self._fatal: str | None = None
        self._ended = False
        self._loaded: Loaded | None = None
        self._server: ReplicaServer | None = None
        self._link = ControlLink(lambda: serve.get_app_handle(CONTROLLER_APP))
        self._announcer = Announcer(self._link, self._info)
        who = self._spec.app, self._replica, self._node, os.getpid()
        self._share = GpuShare(self._link, who)
        try:
            await self._load()
        except Exception as error:
            # Serve will report that the constructor failed; why must reach the operator as one
            # sentence.
            known = isinstance(error, ServingError)
            self._state, self._error = "failed", str(error) if known else repr(error)
            if isinstance(error, FatalDeviceError):
                self._fatal = str(error)
            await self._announcer.tell(_ANNOUNCE_PATIENCE_S)
            raise
        self._announcer.start()

    async def check_health(self) -> None:
        """Serve's health check.

        Raises `RuntimeError` if no batch can reach this replica, or its model is not on the device
        that it was loaded on.
        """
        if self._server is None or self._loaded is None or not self._server.listening:
            raise RuntimeError("the frame server does not listen")
        await asyncio.to_thread(self._check_device, self._loaded.engine)

    async def __del__(self) -> None:
        """Serve calls this once, before it ends the process."""
        if self._server is None:
            return
        self._state = "draining"
        await self._announcer.stop()
        heard = await self._announcer.tell(_DRAIN_ANNOUNCE_PATIENCE_S)
        # Until it is done it holds its share of a GPU, and is known to be on its way out.
        self._announcer.start()
        await asyncio.to_thread(self._server.drain, _DRAIN_LIMIT_S)
        await self._announcer.stop()
        self._watchdog.stop()
        self._server.stop()
        self._ended = True
        if heard:
            # For the ledger: so long it was there, and this it has done.
            await self._announcer.tell(_DRAIN_ANNOUNCE_PATIENCE_S)
        await self._share.release(_RELEASE_TIMEOUT_S)

    async def _load(self) -> None:
        spec = self._spec
        fetch = ArtifactFetcher(self._link, spec.digest, asyncio.get_running_loop())
        if spec.device == "cpu":
            self._loaded = await asyncio.to_thread(load_engine, spec, fetch)
        else:
            async with self._share.while_loading() as lease:
                self._loaded = await asyncio.to_thread(load_engine, spec, fetch, lease)
        engine = self._loaded.engine
        self._load_s = time.monotonic() - self._started
        identity = {
            "model": spec.model,
            "version": spec.version,
            "digest": spec.digest,
            "replica": self._replica,
        }
        tls = await self._tls() if spec.listen_tcp else None
        # A socket path has at most 107 characters, a replica id may have more.
        short = hashlib.sha256(self._replica.encode()).hexdigest()[:16]
        server = ReplicaServer(engine, Path(spec.run_dir) / f"r-{short}.sock", identity, tls)
        engine.on_fatal = LastWords(server.stop, self._tell_fatal, asyncio.get_running_loop())
        server.start()
        self._server = server
        self._watchdog = Watchdog(engine, spec.stall_timeout_s)
        self._watchdog.start()

    def _check_device(self, engine: Engine) -> None:
        try:
            engine.backend.check()
        except FatalDeviceError as error:
            if engine.on_fatal is not None:
                engine.on_fatal(error)
            raise
        except DeviceError as error:
            raise RuntimeError(str(error)) from error

    async def _tell_fatal(self, error: FatalDeviceError) -> None:
        """Announce the end; its caller bounds the time."""
        self._state, self._fatal, self._ended = "draining", str(error), True
        await self._announcer.stop()
        await self._announcer.tell(_DRAIN_ANNOUNCE_PATIENCE_S)
        await self._share.release(_RELEASE_TIMEOUT_S)

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
        server = self._server
        return {
            "replica": self._replica,
            "app": self._spec.app,
            "seat": self._seat,
            "model": self._spec.model,
            "version": self._spec.version,
            "digest": self._spec.digest,
            "node": self._node,
            "unix": server.unix_path if server is not None else None,
            "tcp": server.tcp_address if server is not None else None,
            "pid": os.getpid(),
            "state": self._state,
            "error": self._error,
            "rss_bytes": psutil.Process().memory_info().rss,
            "load_s": self._load_s,
            "fatal": self._fatal,
            "usage": self._usage(),
            "ended": self._ended,
            "cores": self._spec.cores(len(os.sched_getaffinity(0))),
            **(_device_info(self._loaded) if self._loaded else _NOT_LOADED),
        }

    def _usage(self) -> dict[str, int]:
        """`ReplicaUsage` of the ledger; until it is ready, all is warm-up."""
        up_ns = int((time.monotonic() - self._started) * 1e9)
        if self._loaded is None:
            return {**asdict(Usage(0, 0, 0)), "up_ns": up_ns, "warmup_ns": up_ns}
        warmup_ns = int(self._load_s * 1e9)
        return {**asdict(self._loaded.engine.usage), "up_ns": up_ns, "warmup_ns": warmup_ns}


def _device_info(loaded: Loaded) -> dict[str, Any]:
    """What an announcement says of the device."""
    engine = loaded.engine
    backend, meter, profile = engine.backend, engine.backend.meter, loaded.profile
    return {
        "device": backend.device,
        "platform": backend.platform,
        "gpu": meter.uuid if meter is not None else None,
        "lease_bytes": meter.limit_bytes if meter is not None else None,
        "profile": profile.to_dict() if profile is not None else None,
        "ceiling": engine.ceiling,
        "oom_batches": engine.oom_batches,
    }


_NOT_LOADED: Final = dict.fromkeys(
    ("device", "platform", "gpu", "lease_bytes", "profile", "ceiling"), None
) | {"oom_batches": 0}
