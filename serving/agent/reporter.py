"""Tells the controller what was measured and what happened; lives on the agent's loop.

It reports after each measurement, and at once after an XID error. Such errors are kept until a
report with them has arrived.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from serving.agent.poller import PERIOD_S, Readings
from serving.control_link import ControlLink
from serving.core.gpus import NodeReport, XidEvent
from serving.errors import ClusterError

PATIENCE_S: Final = 3 * PERIOD_S
_KEPT_XIDS: Final = 100
_SILENT: Final = "NVML has not answered for some seconds"

_log = logging.getLogger(__name__)


class Reporter:
    """Reports of one node. Without a measurement for `patience_s` seconds it reports that.

    `problem` says why there will be none.
    """

    def __init__(
        self,
        link: ControlLink,
        node: str,
        host: str,
        *,
        driver: str | None = None,
        problem: str = "",
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._link = link
        self._node, self._host, self._driver = node, host, driver
        self._problem = problem
        self._patience_s = patience_s
        self._due = asyncio.Event()
        self._readings: Readings = ()
        self._xids: list[XidEvent] = []

    def measured(self, readings: Readings) -> None:
        """Take the latest measurements."""
        self._readings, self._problem = readings, ""
        self._due.set()

    def happened(self, event: XidEvent) -> None:
        """Take an XID error."""
        self._xids = [*self._xids, event][-_KEPT_XIDS:]
        self._due.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._due.wait()
            except TimeoutError:
                self._problem = self._problem or _SILENT
            self._due.clear()
            await self._tell()

    async def _tell(self) -> None:
        sent = tuple(self._xids)
        report = NodeReport(
            self._node, self._host, self._driver, self._readings, sent, self._problem
        )
        try:
            await self._link.call("report_gpus", report.to_dict(), timeout_s=PATIENCE_S)
        except ClusterError as error:
            _log.info("reporting again: %s", error)
        else:
            self._xids = [event for event in self._xids if event not in sent]
