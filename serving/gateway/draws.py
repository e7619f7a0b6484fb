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
from typing import Final

from serving.gateway.trials import Draw

MOST: Final = 32


class Draws:
    """The draws of one split. While `left` is not 0, one goes on."""

    __slots__ = ("_loop", "_random", "draw", "left", "point")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Which requests are drawn must not be guessed from others; nothing more depends on it.
        self._random = random.Random().random
        # Where its requests lie in [0, 1).
        self.point = 0.0
        # How many more it may have.
        self.left = 0
        self.draw = Draw()

    def begin(self) -> None:
        """Draw for the requests that come in this turn."""
        self.left = MOST
        self.draw = Draw()
        self.point = self._random()
        self._loop.call_soon(self.end)

    def end(self) -> None:
        """The next request is drawn anew."""
        self.left = 0
