"""The real admin API in a thread; its controller's time and traffic are the test's to give."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.control.admin import create_app
from serving.control.controller import Controller
from serving.core.rollout_types import Rollout
from serving.errors import NotFound
from tests.cli.admin import Server
from tests.cli.stories import Traffic
from tests.control.world import World, model_row
from tests.e2e.deployment import eventually, free_port

T = TypeVar("T")
RATE = 200


class Desk:
    """A controller that serves version 1 of `digits`, and what clients and operators do to it.

    `a_look`: how time passes at every look at one rollout, as `pass_time` takes it; so a test tells
    what a command that watches will see. `away`: so many looks find no controller.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.world = World(home)
        self.a_look: dict[str, Any] = {"seconds": 0}
        self.away = 0
        self._traffic: dict[str, Traffic] = {}
        self._answered = 0
        self._loop = asyncio.new_event_loop()
        self._controller: Controller

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def rollout(self) -> Rollout:
        """The newest rollout."""
        return self.run(self._controller.rollouts.find("digits")).rollout

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the controller's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def start(self, to: str = "2", plan: Any = "fast") -> None:
        """A rollout that ada starts."""
        who = {"actor": "ada@desk", "reason": "better on sevens"}
        self.run(self._controller.start_rollout("digits", to, plan, **who))

    def pass_time(self, seconds: int = 1, failing: float = 0.0) -> None:
        """Seconds of traffic, with a report and a tick each; the canary fails a share of it."""
        self.run(self._pass_time(seconds, failing))

    def until(self, *states: str, failing: float = 0.0) -> None:
        """Let time pass until the newest rollout is in one of `states`."""
        for _ in range(200):
            if self.rollout.state in states:
                return
            self.pass_time(failing=failing)
        raise AssertionError(f"still {self.rollout.state}: {self.rollout.reason}")

    async def _pass_time(self, seconds: int, failing: float = 0.0) -> None:
        controller = self._controller
        for _ in range(seconds):
            self.world.monotonic += 1.0
            self.world.announce(controller)
            self._answered += RATE
            controller.report(
                self.world.report(
                    controller.board.revision,
                    models=[model_row("1", self._answered, model="digits")],
                    rollouts=await self._counted(failing),
                )
            )
            await controller.step(look=True)

    async def _counted(self, failing: float) -> dict[str, Any]:
        try:
            rollout = (await self._controller.rollouts.find("digits")).rollout
        except NotFound:
            return {}
        traffic = self._traffic.setdefault(rollout.id, Traffic(RATE))
        if rollout.active:
            traffic.serve(rollout, failing)
        return traffic.rows(rollout.id)

    @contextmanager
    def serve(self) -> Iterator[None]:
        """Listen."""
        self.port = free_port()
        started = threading.Event()
        thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._serve(started))
        )
        thread.start()
        try:
            eventually(lambda: started.is_set() or not thread.is_alive(), "the controller is there")
            eventually(lambda: self._server.started or not thread.is_alive(), "it listens")
            yield
        finally:
            self._server.should_exit = True
            thread.join()
            self._loop.close()
            self.world.store.close()

    async def _serve(self, started: threading.Event) -> None:
        self._controller = await self.world.controller()
        served = {"digits": {"version": "1", "replicas": 2, "rollout": "fast"}}
        await self.world.apply(self._controller, served)
        await self._pass_time(15)
        app = self._timed(create_app(self._controller, host="127.0.0.1", ray_version="2.60"))
        config = uvicorn.Config(app, port=self.port, log_config=None, lifespan="off")
        self._server = Server(config)
        started.set()
        await self._server.serve()

    def _timed(self, app: ASGIApp) -> ASGIApp:
        async def timed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["method"] == "GET" and scope["path"].startswith("/v1/rollouts/"):
                if self.away:
                    self.away -= 1
                    await send({"type": "http.response.start", "status": 502, "headers": []})
                    await send({"type": "http.response.body"})
                    return
                await self._pass_time(**self.a_look)
            await app(scope, receive, send)

        return timed
