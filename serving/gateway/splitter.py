"""Splits a model's requests between its stable version and a canary.

A `Splitter` stands where the stable version's batcher would: it takes a request in, chooses the
arm, and hands it on. It also answers for the canary: with the shield on, a request that the canary
fails is answered by stable within its deadline, and the client never knows.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from serving.core.assignment import unit_point
from serving.core.routing import Split
from serving.errors import ServingError
from serving.gateway.breaker import Breaker
from serving.gateway.draws import Draws
from serving.gateway.epochs import Epochs
from serving.gateway.infer import TICK_S, Call, Sink, monotonic
from serving.gateway.observer import Memory, Observer
from serving.gateway.shadow import Shadow
from serving.gateway.trials import CANARY, Trial, Unit
from serving.gateway.units import Units, unit_finder, unit_headers

if TYPE_CHECKING:
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.batcher import ArmBatcher

log = logging.getLogger(__name__)

# Of its time a shielded request spends at most so much at the canary: the rest is stable's.
_CANARY_SHARE: Final = 0.5


class Splitter:
    """One rollout's split at this gateway. It outlives the epochs of its rollout."""

    __slots__ = (
        "_by_id", "_canary_trial", "_draws", "_elsewhere", "_epochs", "_falls_on_stable",
        "_overrides", "_patience", "_plain", "_room", "_salt", "_shadowing", "_spare",
        "_stable_trial", "_uncounted", "_unit", "_units", "_waiting", "_watch",
        "_weight", "arm", "breaker", "canary", "diverted", "headers", "memory", "overridden",
        "recorder", "refusals_tell", "rollout", "shadow", "shield", "shielded", "stable", "sticks",
    )  # fmt: skip

    def __init__(
        self,
        split: Split,
        stable: ArmBatcher,
        canary: ArmBatcher,
        *,
        loop: asyncio.AbstractEventLoop,
        watch: Callable[[float], None],
        breaker_opened: Callable[[], None],
    ) -> None:
        """`watch` is told of every new deadline, `breaker_opened` when the canary is cut off."""
        self.rollout = split.rollout
        self.breaker = Breaker(split.breaker_failures, monotonic, breaker_opened)
        self.diverted = self.overridden = self.shielded = 0
        self._watch = watch
        self._draws = Draws(loop)
        self._epochs = Epochs(self)
        # Whether requests had units that stick to their arm.
        self.sticks = False
        self.shadow = Shadow(split.rollout, loop, watch)
        self.memory = Memory()
        self.configure(split, stable, canary)

    def configure(self, split: Split, stable: ArmBatcher, canary: ArmBatcher) -> None:
        """Go by a new route table."""
        self.stable, self.canary = stable, canary
        # A draw belongs to one epoch.
        self._draws.end()
        # Rows that waited at the canary when it began, how many more could have without a second
        # thought, and how many of these it has left.
        self._waiting = self._room = self._spare = 0
        # Rows of its draw that it had instead of stable, which had room for them.
        self._elsewhere = 0
        # Whether the draw fell on stable.
        self._falls_on_stable = False
        # With so much time there is no second thought about a request.
        share = _CANARY_SHARE if split.shield else 1.0
        self._patience = canary.arm.queue_max_wait_s / share
        # Of a request that is not in either arm yet: the settings, and what counts its refusal.
        self.arm, self.recorder = stable.arm, stable.recorder
        self._weight = split.weight
        self._salt = split.salt.encode()
        self.shield = split.shield
        # Whether the comparison of both arms tells whose fault inputs are that a model refuses.
        self.refusals_tell = not split.shield and 0.0 < split.weight < 1.0
        self._overrides = [(n.encode(), v.encode(), arm) for n, v, arm in split.overrides]
        # What sticks to an arm; it gives None where a request is drawn by chance.
        self._unit = unit_finder(split.unit)
        self._by_id = split.unit == "request"
        self.headers = frozenset({*(n for n, _, _ in self._overrides), *unit_headers(split.unit)})
        if split.epoch != self._epochs.current:
            self._units = Units(self._salt)
        self._stable_trial, self._canary_trial = self._epochs.begin(split.epoch)
        bound = math.inf if split.latency_bound_s is None else split.latency_bound_s
        self._stable_trial.latency_bound_s = self._canary_trial.latency_bound_s = bound
        # The breaker and the shield hear of what it has; the controller does not.
        self._uncounted = Trial(self, self.rollout, split.epoch, CANARY)
        self.memory.configure(split.feedback)
        self._stable_trial.observer = self._canary_trial.observer = self._observer(split)
        self.shadow.configure(split, stable, canary)
        self._shadowing = split.shadow > 0
        # Whether nothing but chance and an id says where a request goes, and it goes nowhere else.
        self._plain = self._by_id and not self._overrides and not self._shadowing

    def _observer(self, split: Split) -> Observer | None:
        if not split.observe and not split.feedback:
            return None
        memory = self.memory if split.feedback else None
        try:
            return Observer(split, self.stable.arm.signature, memory)
        except ValueError as error:
            log.warning("rollout %s: predictions are not observed: %s", self.rollout, error)
            return None

    # What the pipeline uses of a batcher.

    def admit(self, call: Call) -> None:
        """Choose the arm of a request and queue it there. Raises `Overloaded` or `Unavailable`."""
        if not self._plain or call.sink.given_id:
            self._admit(call)
            return
        draws = self._draws
        if not draws.left:
            self._begin_draw()
        spare = self._spare - call.rows
        if (
            spare < 0
            or not self._falls_on_stable
            or call.deadline - call.arrival < self._patience
            or not self.canary.ready
        ):
            self._admit(call)
            return
        # Most requests: drawn for stable, while the canary has room.
        draws.left -= 1
        self._spare = spare
        call.draw, call.trial = draws.draw, self._stable_trial
        self.stable.admit(call)

    def _admit(self, call: Call) -> None:
        """Choose the arm of any request.

        A request is evidence, whichever arm it is drawn for, only if either could take it just
        then. Where it is drawn for a canary that cannot, stable takes it. Otherwise the canary's
        counts would lack what it could not take, and stable's not.
        """
        if self._overrides and (chosen := self._override(call)) is not None:
            self.overridden += 1
            if chosen == CANARY and self.canary.ready:
                call.arm = self.canary
                self.canary.admit(call)
            else:
                self.stable.admit(call)
            return
        name = call.sink.given_id if self._by_id else self._unit(call)
        if not name:
            # Nobody, or an empty value that all have who are nobody.
            draws = self._draws
            if not draws.left:
                self._begin_draw()
            draws.left -= 1
            call.draw, point = draws.draw, draws.point
            self._spare = spare = self._spare - call.rows
        else:
            if self._by_id:
                # Seldom comes again, and need not be remembered.
                point = unit_point(self._salt, name)
            else:
                unit = self._units.of(name)
                call.draw, point, self.sticks = unit, unit.point, True
            spare = -1 if self.breaker.open else self.canary.spare_rows() - call.rows
        # Most of the time there is no need for a second thought.
        fits = (
            spare >= 0
            and call.deadline - call.arrival >= self._patience
            # A draw's room was seen before: its replica may have been lost since.
            and self.canary.ready
        ) or self._has_room(call, drawn=not name)
        if point >= self._weight:
            if fits:
                call.trial = self._stable_trial
            if self._shadowing:
                self.shadow.sample(call)
            self.stable.admit(call)
        elif fits:
            self._send_to_canary(call, drawn=not name)
        elif not self._goes_all_the_same(call):
            self.diverted += 1
            self.stable.admit(call)

    def id_of(self, call: Call) -> Unit | None:
        """The id of a failed request, if it was drawn by that: one tried again fails once."""
        name = call.sink.given_id if self._by_id else None
        return None if name is None else self._units.of(name)

    def _begin_draw(self) -> None:
        """Look how much room the canary has, and draw.

        Whether a request of the draw fits must not depend on how the draw falls.
        """
        room = -1 if self.breaker.open else self.canary.spare_rows()
        self._spare = self._room = room
        self._waiting = self.canary.queue_depth
        self._elsewhere = 0
        self._draws.begin()
        self._falls_on_stable = self._draws.point >= self._weight

    def _rows_before(self, call: Call) -> int:
        """The rows of a call's draw before its own."""
        return self._room - self._spare - call.rows

    def _has_room(self, call: Call, *, drawn: bool) -> bool:
        """Whether the canary could take a call, one of a draw perhaps."""
        canary = self.canary
        if not self._weight:
            # Nothing is drawn for it.
            return True
        if not canary.ready or self.breaker.open:
            return False
        ahead = self._waiting + self._rows_before(call) if drawn else canary.queue_depth
        return canary.has_room_behind(ahead, call, self._canary_deadline(call))

    def _canary_deadline(self, call: Call) -> float:
        if not self.shield:
            return call.deadline
        return call.arrival + _CANARY_SHARE * (call.deadline - call.arrival)

    def _send_to_canary(self, call: Call, *, drawn: bool) -> None:
        stable = self.stable
        # What stable would refuse is in none of its counts.
        ahead = stable.queue_depth + (self._elsewhere if drawn else 0)
        if stable.has_room_behind(ahead, call, call.deadline):
            call.trial = self._canary_trial
            if drawn:
                self._elsewhere += call.rows
        else:
            call.trial, call.draw = self._uncounted, None
        self._give(call)

    def _goes_all_the_same(self, call: Call) -> bool:
        """Whether a call that is no evidence goes to the canary nevertheless.

        Raises `Overloaded` where only the canary could answer, and has no room.
        """
        canary = self.canary
        if not canary.ready:
            return False
        if not self.stable.ready:
            call.arm, call.trial, call.draw = canary, self._uncounted, None
            canary.admit(call)
            return True
        if not self._probes(call):
            return False
        call.trial, call.draw = self._uncounted, None
        self._give(call)
        return True

    def _probes(self, call: Call) -> bool:
        """Whether a call finds out for an open breaker how the canary is."""
        breaker, canary = self.breaker, self.canary
        # Last the breaker: it lets few through.
        return (
            breaker.open
            and canary.has_room_behind(canary.queue_depth, call, self._canary_deadline(call))
            and breaker.lets_through()
        )

    def _give(self, call: Call) -> None:
        if self.shield:
            call.deadline, call.final_deadline = self._canary_deadline(call), call.deadline
        call.arm = self.canary
        self.canary.take(call)

    def _override(self, call: Call) -> str | None:
        for name, value, arm in self._overrides:
            if call.sink.header(name) == value:
                return arm
        return None

    # The shield.

    def take_over(self, call: Call, judge: Trial | None) -> bool:
        """Let stable answer what the canary failed; whether it will.

        With a `judge`, the failure is counted there only if stable does answer.
        """
        if not self.shield:
            return False
        sink = call.sink if judge is None else _Judged(call, judge)
        return self._ask_stable(call, sink, call.final_deadline or call.deadline)

    def hand_over(self, call: Call) -> None:
        """Let stable answer, if it can, what the canary has not yet: that is only judged then."""
        if self._ask_stable(call, call.sink, call.deadline):
            call.sink, call.unseen = _Nobody(call.sink), True

    def _ask_stable(self, call: Call, sink: Sink, deadline: float) -> bool:
        if self.stable.closed or deadline <= monotonic() + TICK_S:
            return False
        arrival, level = call.arrival, call.level
        leg = Call(self.stable, call.request, sink, arrival, deadline, level, call.tenant)
        if not self.stable.has_room(leg):
            return False
        self.stable.admit(leg)
        self.shielded += 1
        call.arm.recorder.refused("shielded", monotonic() - call.arrival)
        sink.moved(leg)
        self._watch(deadline)
        return True

    def report(self) -> Iterator[dict[str, Any]]:
        """The counts of every epoch, a row an arm and replica."""
        return self._epochs.report()

    def heard(self, outstanding: Callable[[], Iterable[Call]]) -> None:
        """The controller has a report: epochs that are over are told no more."""

        def busy() -> set[int]:
            trials = (_trial_of(call) for call in outstanding())
            mine = {t.epoch for t in trials if t is not None and t.splitter is self}
            return mine | self.shadow.open

        self.shadow.forget(self._epochs.heard(busy, self.memory.window_s, monotonic()))

    def summary(self) -> dict[str, Any]:
        """What concerns no arm."""
        return {
            "rollout": self.rollout,
            "breaker": "open" if self.breaker.open else "closed",
            "opened": self.breaker.openings,
            "shielded": self.shielded,
            "overridden": self.overridden,
            "diverted": self.diverted,
            "forgotten": self.memory.forgotten,
        }


class _Nobody:
    """The sink of a request that its client waits for no more."""

    def __init__(self, was: Sink) -> None:
        self.header, self.given_id = was.header, was.given_id

    def answered(self, call: Call, answer: BatchAnswer, position: int) -> float:
        return monotonic()

    def failed(self, call: Call, error: ServingError) -> None:
        pass

    def moved(self, call: Call) -> None:
        pass

    def reply_id(self) -> bytes:
        return b""


def _trial_of(call: Call) -> Trial | None:
    """Where it will be counted what comes of a call."""
    return call.sink.judge if isinstance(call.sink, _Judged) else call.trial


class _Judged:
    """The sink of a request whose input the canary's model refused: would stable take it."""

    def __init__(self, call: Call, judge: Trial) -> None:
        self._call = call
        self.judge = judge
        self.given_id = call.sink.given_id

    def answered(self, call: Call, answer: BatchAnswer, position: int) -> float:
        finished = self._call.sink.answered(call, answer, position)
        self.judge.count_failure(self._call)
        return finished

    def failed(self, call: Call, error: ServingError) -> None:
        self._call.sink.failed(call, error)

    def moved(self, call: Call) -> None:
        self._call.sink.moved(call)

    def header(self, name: bytes) -> bytes | None:
        return self._call.sink.header(name)

    def reply_id(self) -> bytes:
        return self._call.sink.reply_id()
