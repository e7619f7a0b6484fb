"""The real admin API in a thread, over a controller whose cluster is only names."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from serving.control.admin import create_app
from tests.control.world import World
from tests.e2e.deployment import eventually, free_port


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def admin_api(
    home: Path, models: dict[str, Any], gpus: Sequence[dict[str, Any]] = ()
) -> Iterator[int]:
    """Serve `models`, all of them ready; the port. `gpus` are reports of node agents."""
    port = free_port()
    world = World(home)
    servers: list[Server] = []

    async def work() -> None:
        controller = await world.controller()
        await world.apply(controller, models)
        await world.settle(controller)
        for report in gpus:
            await controller.gpus.report(report)
        app = create_app(controller, host="127.0.0.1", ray_version="2.60")
        config = uvicorn.Config(app, port=port, log_config=None, lifespan="off")
        servers.append(Server(config))
        await servers[0].serve()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        eventually(lambda: (servers and servers[0].started) or not thread.is_alive(), "it listens")
        yield port
    finally:
        for server in servers:
            server.should_exit = True
        thread.join()
        world.store.close()
