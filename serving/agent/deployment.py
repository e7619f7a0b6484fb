"""The node agent as a Ray Serve deployment: one a node with GPUs; supervision only."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from serving.agent.events import XidWatcher
from serving.agent.nvml import Nvml
from serving.agent.poller import Poller
from serving.agent.reporter import Reporter
from serving.control_link import CONTROLLER_APP, ControlLink
from serving.errors import DeviceError
from serving.logs import configure_logging


@serve.deployment
class NodeAgent:
    """Measures the GPUs of its node and reports them. Without NVML it reports why."""

    async def __init__(self) -> None:  # type: ignore[misc]
        configure_logging()
        link = ControlLink(lambda: serve.get_app_handle(CONTROLLER_APP))
        node, host = ray.get_runtime_context().get_node_id(), socket.gethostname()
        self._nvml: Nvml | None = None
        try:
            self._nvml = await asyncio.to_thread(Nvml.open, node)
            self._reporter = Reporter(link, node, host, driver=self._nvml.driver)
        except DeviceError as error:
            self._reporter = Reporter(link, node, host, problem=str(error))
        if self._nvml is not None:
            loop = asyncio.get_running_loop()
            self._watcher = XidWatcher(self._nvml, _on(loop, self._reporter.happened))
            self._poller = Poller(self._nvml, _on(loop, self._reporter.measured))
            await asyncio.to_thread(self._watcher.start)
            self._poller.start()
        self._task = asyncio.create_task(self._reporter.run())

    async def check_health(self) -> None:
        """Serve's health check. Raises `RuntimeError` when nothing is measured or reported."""
        if self._task.done() or (self._nvml is not None and not self._poller.alive):
            raise RuntimeError("the agent has stopped to measure or to report")

    async def __del__(self) -> None:
        """Serve calls this once, before it ends the process."""
        if not hasattr(self, "_task"):
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._nvml is not None:
            await asyncio.to_thread(self._watcher.stop)
            await asyncio.to_thread(self._poller.stop)
            self._nvml.close()


def _on(loop: asyncio.AbstractEventLoop, take: Callable[[Any], None]) -> Callable[[Any], None]:
    """`take` for a thread: it is called on `loop`."""

    def post(value: Any) -> None:
        # At the end the loop may be gone before the threads.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(take, value)

    return post
