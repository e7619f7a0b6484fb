"""What a replica asks of the controller: to be heard, for its artifact, and for its GPU."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from serving.artifacts import Manifest, write_manifest
from serving.control_link import FIRST_BACKOFF_S, MAX_BACKOFF_S, ControlLink
from serving.core.replica import GpuLease
from serving.errors import ArtifactError, ClusterError, Unavailable, operator_error

ANNOUNCE_PERIOD_S: Final = 2.0
_FETCH_PATIENCE_S: Final = 120.0
_LEASE_PATIENCE_S: Final = 120.0
_RENEWAL_PERIOD_S: Final = 2.0
# Well under the 4 MiB that a Serve gRPC message may have.
_CHUNK_BYTES: Final = 2 << 20

_log = logging.getLogger(__name__)


class Announcer:
    """Tells the controller periodically what this replica is; `info` makes the message."""

    def __init__(self, link: ControlLink, info: Callable[[], dict[str, Any]]) -> None:
        self._link = link
        self._info = info
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to announce, now and then periodically, on the running loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Announce no longer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def tell(self, patience_s: float) -> bool:
        """Announce once, trying for `patience_s` seconds; whether it was heard."""
        try:
            await self._link.call_patiently("announce", self._info(), patience_s=patience_s)
        except ClusterError as error:
            _log.warning("this replica could not announce itself: %s", error)
            return False
        return True

    async def _run(self) -> None:
        pause_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._link.call("announce", self._info(), timeout_s=ANNOUNCE_PERIOD_S)
                pause_s = FIRST_BACKOFF_S
                await asyncio.sleep(ANNOUNCE_PERIOD_S)
            except ClusterError as error:
                _log.info("announcing again: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_BACKOFF_S)


class ArtifactFetcher:
    """Copies a bundle from the controller's cache to this node; called on a thread.

    `loop` is the loop that the control calls run on.
    """

    def __init__(self, link: ControlLink, digest: str, loop: asyncio.AbstractEventLoop) -> None:
        self._link = link
        self._digest = digest
        self._loop = loop

    def __call__(self, directory: Path) -> None:
        """Write the bundle into `directory`.

        Raises `ArtifactError` if the controller has another bundle under this digest,
        `ClusterError` if it stays away for two minutes.
        """
        manifest = Manifest.from_dict(self._wait(self._ask("manifest", self._digest)))
        if manifest.digest != self._digest:
            raise ArtifactError(
                f"the controller sent the manifest of {manifest.digest}, expected {self._digest}"
            )
        for entry in manifest.files:
            path = directory / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for at in range(0, entry.size, _CHUNK_BYTES):
                    size = min(_CHUNK_BYTES, entry.size - at)
                    chunk = self._wait(
                        self._ask("read_artifact", self._digest, entry.path, at, size)
                    )
                    if len(chunk) != size:
                        raise ArtifactError(
                            f"the controller sent {len(chunk)} bytes of {entry.path}, not {size}"
                        )
                    file.write(chunk)
        write_manifest(directory, manifest)

    def _ask(self, method: str, *args: Any) -> Coroutine[Any, Any, Any]:
        return self._link.call_patiently(method, *args, patience_s=_FETCH_PATIENCE_S)

    def _wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()


class GpuShare:
    """The replica's share of a GPU, which the controller keeps a book of.

    `who` is (application, replica, node, process id).
    """

    def __init__(self, link: ControlLink, who: tuple[str, str, str, int]) -> None:
        self._link = link
        self._who = who
        self._held = False

    @asynccontextmanager
    async def while_loading(self) -> AsyncIterator[GpuLease | None]:
        """The lease, kept alive; from then on announcements do that. None: run on the CPU.

        Raises `DeviceError` if there is no room, `ClusterError` if nobody answers for two minutes.
        """
        lease = await self._take()
        self._held = lease is not None
        renewals = asyncio.create_task(self._renew()) if self._held else None
        try:
            yield lease
        finally:
            if renewals is not None:
                renewals.cancel()
                await asyncio.gather(renewals, return_exceptions=True)

    async def release(self, timeout_s: float) -> None:
        """Give the share back; an absent controller is only logged, and finds out by itself."""
        if not self._held:
            return
        try:
            await self._link.call("release_gpu", self._who[1], timeout_s=timeout_s)
        except ClusterError as error:
            _log.info("the share of the GPU was not given back: %s", error)

    async def _take(self) -> GpuLease | None:
        deadline = asyncio.get_running_loop().time() + _LEASE_PATIENCE_S
        while True:
            answer = await self._link.call_patiently(
                "lease_gpu", *self._who, patience_s=_LEASE_PATIENCE_S
            )
            if "error" not in answer:
                lease = answer["lease"]
                return None if lease is None else GpuLease.from_dict(lease)
            error = operator_error(answer["slug"], answer["error"])
            late = asyncio.get_running_loop().time() >= deadline
            if answer["slug"] != Unavailable.slug or late:
                raise error
            await asyncio.sleep(FIRST_BACKOFF_S)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEWAL_PERIOD_S)
            try:
                await self._link.call("lease_gpu", *self._who)
            except ClusterError as error:
                _log.info("asking for the GPU again: %s", error)
