"""A rollout's clocks: what holds, gates, bake and timeouts count from, and what they leave out.

`entered_at` and `step_entered_at` say when the state and the step would have begun had nothing
stopped the clocks: what stopped them is added once it is over. Clocks stand still in a pause, and
while an arm that the state needs has no ready replica. Of times that overlap each second counts
once, as at any time only one of the two is running: a pause ends an absence for the clocks, and
its end begins it anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from serving.core.rollout_danger import stopped_by
from serving.core.rollout_states import State
from serving.core.rollout_types import Rollout

LOOKS: Final = 5
"""Ticks that a look may come late; of a longer time so much counts."""
LATE_S: Final = 5.0
"""The same in seconds, where ticks are short."""


def clocks_watched(rollout: Rollout, now: float) -> Rollout:
    """With its clocks standing still or going on, as its arms are away or back."""
    stopped = rollout.state is not State.PAUSED and bool(stopped_by(rollout))
    if not stopped:
        return clocks_caught_up(rollout, now)
    return rollout if rollout.still_since is not None else replace(rollout, still_since=now)


def clocks_caught_up(rollout: Rollout, now: float) -> Rollout:
    """With its clocks going on: the time for which they stood still is no part of any hold."""
    if rollout.still_since is None:
        return rollout
    still_s = max(0.0, now - rollout.still_since)
    return replace(
        rollout,
        entered_at=rollout.entered_at + still_s,
        step_entered_at=rollout.step_entered_at + still_s,
        still_since=None,
    )


def unwatched_s(rollout: Rollout, looked_at: float | None, now: float) -> float:
    """Seconds since the last look in which nobody looked; less than 0: the clock was set back."""
    since = 0.0 if looked_at is None else now - looked_at
    late = max(LATE_S, LOOKS * rollout.spec.analysis.tick_s)
    return since if since < -late else max(0.0, since - late)


def left_out(rollout: Rollout, seconds: float) -> Rollout:
    """With its clocks moved on by a time that counts for nothing, as nobody looked."""

    def moved(at: float | None) -> float | None:
        return None if at is None else at + seconds

    later = replace(
        rollout,
        stable_lost_at=moved(rollout.stable_lost_at),
        canary_lost_at=moved(rollout.canary_lost_at),
        still_since=moved(rollout.still_since),
        waiting_since=moved(rollout.waiting_since),
    )
    if rollout.state is State.PAUSED:
        return later  # its clocks stand still anyway
    return replace(
        later,
        entered_at=rollout.entered_at + seconds,
        step_entered_at=rollout.step_entered_at + seconds,
    )
