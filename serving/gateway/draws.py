"""Chance: requests that nothing ties to an arm, drawn by the turn of the event loop.

What arrives in one turn travels together, so it is drawn together: a turn goes to one arm as a
whole, at most `MOST` requests by one draw. Drawn one by one, a canary of 5 % would get a run of one
or two requests out of every turn, and a run costs about as much whatever is in it. A gateway with
little to do has one request a turn and draws each by itself.

Evidence needs each draw to be unbiased whatever came before, and its outcomes to be counted as one
(`serving.gateway.trials.Draw`). It is: the chance of the canary is the weight for every draw, so
for every request; and what belongs to a draw does not depend on how it falls. A turn's requests
have all arrived when the loop polls, before the first of them is read and the draw is made. A draw
ends in the callback that it schedules itself, at the end of its turn, or when it is full, and no
replica's answer to one of its requests is read before that, to bring another into it. Queues have
no say in it. How busy the gateway is, and so how large the next turn is, may well depend on earlier
draws: a draw must be fair given the past, not independent of it.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from serving.gateway.trials import Draw

if TYPE_CHECKING:
    from serving.gateway.infer import Call

MOST: Final = 32


class Draws:
    """The draws of one split."""

    __slots__ = ("_draw", "_left", "_loop", "_point", "_random", "first")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Which requests are drawn must not be guessed from others; nothing more depends on it.
        self._random = random.Random().random
        self._point = 0.0
        # How many more the draw may have.
        self._left = 0
        # The request that it began with.
        self.first: Call | None = None
        self._draw: Draw | None = None

    def point(self, call: Call) -> float:
        """Where a request lies in [0, 1); it refers to its draw if it shares that with others."""
        if self._left:
            self._left -= 1
            draw = self._draw
            if draw is None:
                draw = self._draw = Draw()
                if self.first is not None:
                    self.first.draw = draw
            call.draw = draw
            return self._point
        self._left = MOST - 1
        self.first, self._draw = call, None
        self._loop.call_soon(self.end)
        self._point = point = self._random()
        return point

    def end(self) -> None:
        """The next request is drawn anew."""
        self._left = 0
        self.first = self._draw = None
