"""What a replica asks of the controller: to hear its announcements, and for its artifact."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from serving.artifacts import Manifest, write_manifest
from serving.control_link import FIRST_BACKOFF_S, MAX_BACKOFF_S, ControlLink
from serving.errors import ArtifactError, ClusterError

ANNOUNCE_PERIOD_S: Final = 2.0
_FETCH_PATIENCE_S: Final = 120.0
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

    async def tell(self, patience_s: float) -> None:
        """Announce once, trying for `patience_s` seconds; an absent controller is only logged."""
        try:
            await self._link.call_patiently("announce", self._info(), patience_s=patience_s)
        except ClusterError as error:
            _log.warning("this replica could not announce itself: %s", error)

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
