"""The gateway as a Ray Serve deployment: supervision only, requests come by its own listener."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any, Final

import ray
from ray import serve

from serving.config import parse_config
from serving.control_link import CONTROLLER_APP, ControlLink
from serving.gateway.server import GatewayServer
from serving.logs import configure_logging

# Requests make no cycles. Collecting the young generation every 700 allocations, Python's default,
# would cost more than it finds.
_GC_THRESHOLDS: Final = (50_000, 20, 100)


@serve.deployment
class Gateway:
    """One gateway process. `raw` is the configuration as plain JSON."""

    async def __init__(self, raw: Mapping[str, Any]) -> None:  # type: ignore[misc]
        configure_logging()
        config = parse_config(dict(raw), source="configuration")
        self._server = GatewayServer(
            config.gateway,
            gateway=serve.get_replica_context().replica_id.unique_id,
            node=ray.get_runtime_context().get_node_id(),
            controller=ControlLink(lambda: serve.get_app_handle(CONTROLLER_APP)),
            tick_s=config.control.tick_s,
            tenants=config.tenants,
        )
        await self._server.start()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)

    async def check_health(self) -> None:
        """Serve's health check. Raises `RuntimeError` when the listener or a loop has ended."""
        if not self._server.alive:
            raise RuntimeError("the gateway's listener or one of its loops has ended")

    async def __del__(self) -> None:
        """Serve calls this once, before it ends the process."""
        if hasattr(self, "_server"):
            await self._server.stop()
