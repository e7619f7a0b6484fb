"""What goes wrong in the controller's loops, and stays wrong until a later tick does it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from serving.errors import OperatorError, ServingError

log = logging.getLogger(__name__)


class Problems:
    """The problems that there are, by what failed; `count` of all that there were."""

    def __init__(self) -> None:
        self.count = 0
        self._current: dict[str, str] = {}

    @property
    def last(self) -> str:
        """Why a loop's last tick failed; empty if none did."""
        return next(iter(self._current.values()), "")

    async def guard(self, what: str, work: Awaitable[None]) -> None:
        """Do it; what fails is shown in the status, and done again by the next tick."""
        try:
            await work
            self._current.pop(what, None)
        except ServingError as error:
            self._failed(what, error)
        except Exception as error:
            log.exception("%s", what)
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        self.count += 1
        if str(error) != self._current.get(what) and isinstance(error, OperatorError):
            log.error("%s", error)
        self._current[what] = str(error) or type(error).__name__
