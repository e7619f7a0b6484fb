"""What the controller is told, and what is told again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from serving.agent.reporter import Reporter
from serving.control_link import ControlLink
from serving.core.gpus import Gpu, GpuSample, NodeReport, XidEvent

READINGS = ((Gpu("GPU-a", "n", 0, "A100", 80), GpuSample(1.0, power_w=5.0)),)


class Controller:
    """Takes reports, as many as it does not refuse first."""

    def __init__(self, refused: int = 0) -> None:
        self.refused = refused
        self.accepts = asyncio.Event()
        self.taken: asyncio.Queue[NodeReport] = asyncio.Queue()
        self.report_gpus = self

    def remote(self, raw: dict[str, Any]) -> Awaitable[None]:
        return self._take(NodeReport.from_dict(raw))

    async def _take(self, report: NodeReport) -> None:
        if self.refused:
            self.refused -= 1
            if not self.refused:
                self.accepts.set()
            raise RuntimeError("actor unavailable")
        await self.taken.put(report)

    async def next(self) -> NodeReport:
        return await asyncio.wait_for(self.taken.get(), 20.0)


def play(
    controller: Controller, scenario: Callable[[Reporter], Awaitable[None]], **options: Any
) -> None:
    async def run() -> None:
        reporter = Reporter(ControlLink(lambda: controller), "n", "host", driver="580", **options)
        task = asyncio.create_task(reporter.run())
        await scenario(reporter)
        task.cancel()

    asyncio.run(run())


def test_a_measurement_is_reported() -> None:
    controller = Controller()

    async def scenario(reporter: Reporter) -> None:
        reporter.measured(READINGS)
        assert await controller.next() == NodeReport("n", "host", "580", READINGS)

    play(controller, scenario)


def test_an_error_is_told_until_it_has_arrived_and_then_no_more() -> None:
    controller = Controller(refused=2)
    event = XidEvent("GPU-a", 79, 1.0)

    async def scenario(reporter: Reporter) -> None:
        reporter.happened(event)
        await controller.accepts.wait()
        # The next measurement takes it along.
        reporter.measured(READINGS)
        assert (await controller.next()).xids == (event,)
        reporter.measured(READINGS)
        assert (await controller.next()).xids == ()

    play(controller, scenario, patience_s=0.05)


def test_silence_of_nvml_is_told_until_it_measures_again() -> None:
    controller = Controller()

    async def scenario(reporter: Reporter) -> None:
        reporter.measured(READINGS)
        assert (await controller.next()).problem == ""
        silent = await controller.next()
        assert (silent.problem, silent.gpus) == ("NVML has not answered for some seconds", READINGS)
        reporter.measured(READINGS)
        while (await controller.next()).problem:
            pass

    play(controller, scenario, patience_s=0.05)


def test_a_node_without_nvml_says_why() -> None:
    controller = Controller()

    async def scenario(_: Reporter) -> None:
        assert (await controller.next()).problem == "NVML does not start: Driver Not Loaded"

    play(controller, scenario, problem="NVML does not start: Driver Not Loaded", patience_s=0.01)
