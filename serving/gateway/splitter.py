"""Splits a model's requests between its stable version and a canary.

A `Splitter` stands where the stable version's batcher would: it takes a request in, chooses the
arm, and hands it on. It also answers for the canary: with the shield on, a request that the canary
fails is answered by stable within its deadline, and the client never knows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any, Final

from serving.core.assignment import unit_hash, unit_point
from serving.core.routing import Arm, Split
from serving.errors import ServingError
from serving.gateway.breaker import Breaker
from serving.gateway.infer import TICK_S, Call, monotonic
from serving.gateway.trials import CANARY, STABLE, Trial

if TYPE_CHECKING:
    from serving.core.protocol import InferCodec
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.batcher import ArmBatcher
    from serving.gateway.recorder import ArmRecorder

# Of its time a shielded request spends at most so much at the canary: the rest is stable's.
_CANARY_SHARE: Final = 0.5
REQUEST_ID: Final = b"x-request-id"


class Splitter:
    """One rollout's split at this gateway. It outlives the epochs of its rollout."""

    def __init__(
        self,
        split: Split,
        stable: ArmBatcher,
        canary: ArmBatcher,
        *,
        watch: Callable[[float], None],
        breaker_opened: Callable[[], None],
    ) -> None:
        """`watch` is told of every new deadline, `breaker_opened` when the canary is cut off."""
        self.rollout = split.rollout
        self.breaker = Breaker(split.breaker_failures, monotonic, breaker_opened)
        self.diverted = self.overridden = self.shielded = 0
        self._watch = watch
        # Which requests are drawn must not be guessed from others; nothing more depends on it.
        self._draw = random.Random().random
        self._trials: dict[tuple[int, str], Trial] = {}
        self.configure(split, stable, canary)

    def configure(self, split: Split, stable: ArmBatcher, canary: ArmBatcher) -> None:
        """Go by a new route table."""
        self.stable, self.canary = stable, canary
        self._weight = split.weight
        self._salt = split.salt.encode()
        self._shield = split.shield
        self._overrides = [(n.encode(), v.encode(), arm) for n, v, arm in split.overrides]
        kind, _, name = split.unit.partition(":")
        self._unit_kind, self._unit_name = kind, name
        self._stable_trial = self._trial(split.epoch, STABLE)
        self._canary_trial = self._trial(split.epoch, CANARY)

    def _trial(self, epoch: int, arm: str) -> Trial:
        return self._trials.setdefault((epoch, arm), Trial(self, self.rollout, epoch, arm))

    # What the pipeline uses of a batcher.

    @property
    def codec(self) -> InferCodec:
        """Both arms have one signature: stable's codec reads for either."""
        return self.stable.codec

    @property
    def arm(self) -> Arm:
        """Stable's settings: those of a request that is not in either arm yet."""
        return self.stable.arm

    @property
    def recorder(self) -> ArmRecorder:
        """Counts what is refused before it is in either arm."""
        return self.stable.recorder

    def admit(self, call: Call) -> None:
        """Choose the arm of a request and queue it there.

        Raises `Overloaded` or `Unavailable`, for stable only: a canary that has no room or no
        replica is passed over, and the request is then in neither arm's counts.
        """
        chosen = self._override(call) if self._overrides else None
        if chosen is not None:
            self.overridden += 1
            if chosen == CANARY and self.canary.ready:
                call.arm = self.canary
                self.canary.admit(call)
                return
        else:
            unit = self._unit(call)
            point = self._draw() if unit is None else unit_point(self._salt, unit)
            if point >= self._weight:
                call.trial = self._stable_trial
            elif self._admit_to_canary(call):
                return
        call.arm = self.stable
        self.stable.admit(call)

    def _admit_to_canary(self, call: Call) -> bool:
        canary = self.canary
        if not canary.ready or not self.breaker.lets_through() or not canary.has_room(call):
            self.diverted += 1
            return False
        call.arm = canary
        call.trial = self._canary_trial
        if self._shield:
            call.final_deadline = call.deadline
            call.deadline = call.arrival + _CANARY_SHARE * (call.deadline - call.arrival)
        canary.admit(call)
        return True

    # Units.

    @property
    def headers(self) -> set[bytes]:
        """The request headers that the split depends on; names are lower-case."""
        names = {name for name, _, _ in self._overrides}
        if self._unit_kind == "header":
            names.add(self._unit_name.lower().encode())
        elif self._unit_kind == "cookie":
            names.add(b"cookie")
        return names

    def _override(self, call: Call) -> str | None:
        for name, value, arm in self._overrides:
            if call.sink.header(name) == value:
                return arm
        return None

    def _unit(self, call: Call) -> bytes | None:
        """What sticks to an arm; None where every request is drawn by itself."""
        kind = self._unit_kind
        if kind == "request":
            return call.sink.header(REQUEST_ID)
        if kind == "header":
            return call.sink.header(self._unit_name.lower().encode())
        if kind == "cookie":
            return _cookie(call.sink.header(b"cookie"), self._unit_name)
        value = call.request.parameters.get(self._unit_name)
        return None if value is None else str(value).encode()

    def unit_hash(self, call: Call) -> int | None:
        """What a failed unit is remembered by; None where requests are not units of more."""
        unit = self._unit(call)
        return None if unit is None else unit_hash(self._salt, unit)

    # The shield.

    def take_over(self, call: Call, judge: Trial | None) -> bool:
        """Let stable answer what the canary failed; whether it will.

        With a `judge`, the failure is counted there only if stable does answer.
        """
        deadline = call.final_deadline or call.deadline
        if not self._shield or self.stable.closed or deadline <= monotonic() + TICK_S:
            return False
        sink = call.sink if judge is None else _Judged(call, judge)
        leg = Call(self.stable, call.request, sink, call.arrival, deadline, call.level)
        try:
            self.stable.admit(leg)
        except ServingError:
            return False
        self.shielded += 1
        call.sink.moved(leg)
        self._watch(deadline)
        return True

    def report(self) -> Iterator[dict[str, Any]]:
        """The counts of every epoch, a row an arm and replica."""
        for trial in self._trials.values():
            yield from trial.report()

    def summary(self) -> dict[str, Any]:
        """What concerns no arm."""
        return {
            "rollout": self.rollout,
            "breaker": "open" if self.breaker.open else "closed",
            "opened": self.breaker.openings,
            "shielded": self.shielded,
            "overridden": self.overridden,
            "diverted": self.diverted,
        }


class _Judged:
    """The sink of a request whose input the canary's model refused: would stable take it."""

    def __init__(self, call: Call, judge: Trial) -> None:
        self._call = call
        self._judge = judge

    def answered(self, call: Call, answer: BatchAnswer, position: int) -> float:
        finished = self._call.sink.answered(call, answer, position)
        self._judge.count_failure(self._call)
        return finished

    def failed(self, call: Call, error: ServingError) -> None:
        self._call.sink.failed(call, error)

    def moved(self, call: Call) -> None:
        self._call.sink.moved(call)

    def header(self, name: bytes) -> bytes | None:
        return self._call.sink.header(name)


def _cookie(header: bytes | None, name: str) -> bytes | None:
    if header is None:
        return None
    try:
        cookies: SimpleCookie = SimpleCookie(header.decode("latin-1"))
    except CookieError:
        return None
    return cookies[name].value.encode("latin-1") if name in cookies else None
