"""The inference pipeline: from a decoded request and a sink to exactly one answer.

It knows nothing of HTTP. A transport decodes its request, submits it with a `Sink`, and the sink is
called once: with the outputs, or with a `ServingError`. A caller that is gone calls `cancel` and
hears no more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

from serving.core.batching import DEFAULT_PRIORITY, LOWEST_PRIORITY
from serving.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailed,
    ServingError,
    Unavailable,
)
from serving.gateway.trials import together
from serving.tenant_settings import DEFAULT_TENANT

if TYPE_CHECKING:
    from serving.core.inference import InferRequest
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.batcher import ArmBatcher
    from serving.gateway.splitter import Splitter
    from serving.gateway.trials import Cluster, Draw, Trial

log = logging.getLogger(__name__)

_ERRORS: Final = {cls.slug: cls for cls in ServingError.__subclasses__()}
MAX_TIMEOUT_S: Final = 3600.0
# A timer may fire up to a clock tick early: what is due within it is due.
TICK_S: Final = 0.001
monotonic = time.monotonic


class Sink(Protocol):
    """Where an answer goes. Exactly one of the two is called, once, on the loop."""

    def answered(self, call: Call, answer: BatchAnswer, position: int) -> float:
        """Deliver the call's part of an answer, valid now; return when it was done (monotonic)."""

    def failed(self, call: Call, error: ServingError) -> None:
        """Deliver an error."""

    def moved(self, call: Call) -> None:
        """Note that `call` takes over: it is the one to cancel, and the one that will answer."""

    @property
    def given_id(self) -> bytes | None:
        """The request id that the client gave."""

    def header(self, name: bytes) -> bytes | None:
        """A header of the request that the route table asks for; `name` is lower-case."""

    def reply_id(self) -> bytes:
        """The request id that the reply carries, given or made up."""


class Call:
    """One admitted request on its way. Times are `time.monotonic()` seconds."""

    __slots__ = (
        "arm",
        "arrival",
        "cluster",
        "deadline",
        "done",
        "draw",
        "final_deadline",
        "key",
        "level",
        "losses",
        "pinned",
        "replica",
        "request",
        "rows",
        "sent",
        "sink",
        "suspect",
        "tenant",
        "trial",
        "unseen",
    )

    def __init__(
        self,
        arm: ArmBatcher,
        request: InferRequest,
        sink: Sink,
        arrival: float,
        deadline: float,
        level: int,
        tenant: str,
    ) -> None:
        self.arm = arm
        self.request = request
        self.rows = request.rows
        self.key: Hashable = request.key
        self.sink = sink
        self.arrival = arrival
        self.deadline = deadline
        self.level = level
        self.tenant = tenant
        # Whether its client named the version.
        self.pinned = False
        self.sent = 0.0
        # How many replicas were lost that had it, and whether it may be what killed the last one.
        self.losses = 0
        self.suspect = False
        self.done = False
        # The replica that had it last.
        self.replica = ""
        # Of a request in a rollout: where it is counted, the draw and the fate that it shares with
        # others, and when the client's time is up, if the canary has only a part of it.
        self.trial: Trial | None = None
        self.draw: Draw | None = None
        self.cluster: Cluster | None = None
        self.final_deadline = 0.0
        # No client waits for it: it is there to be judged, and no metric of clients counts it.
        self.unseen = False

    def fail(self, error: ServingError) -> None:
        """Answer with an error, once, and count it."""
        if self.done:
            return
        self.done = True
        trial = self.trial
        if trial is not None and trial.failed(self, error):
            return
        self._let_go()
        if not self.unseen:
            self.arm.recorder.refused(error.slug, monotonic() - self.arrival)
        try:
            self.sink.failed(self, error)
        except Exception:
            # Whoever fails one call has others to see to.
            log.exception("an error of model %s could not be delivered", self.arm.arm.model)

    def _let_go(self) -> None:
        """Drop the inputs: a batch that still runs would hold them, and nobody counts them."""
        if self.sent:
            self.request = self.request.emptied()

    def hand_over(self) -> bool:
        """Let stable answer if the canary has had its part of the time; whether time is left.

        The call itself goes on, to be judged by what it would have come to: by the client's
        deadline, as stable's requests are.
        """
        if not self.final_deadline or self.trial is None:
            return False
        self.deadline, self.final_deadline = self.final_deadline, 0.0
        self.trial.splitter.hand_over(self)
        return True

    def cancel(self) -> None:
        """Forget the request: its caller is gone."""
        if self.done:
            return
        self.done = True
        self._let_go()
        seconds = monotonic() - self.arrival
        if self.trial is not None:
            self.trial.given_up(self, seconds)
        self.arm.recorder.refused("cancelled", seconds)
        self.arm.forget(self)


class Pipeline:
    """Admits requests and holds them to their deadlines."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, batchers: Callable[[], Iterable[ArmBatcher]]
    ) -> None:
        self._loop = loop
        self._batchers = batchers
        self._next_deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def submit(
        self,
        arm: ArmBatcher | Splitter,
        request: InferRequest,
        sink: Sink,
        arrival: float,
        header_timeout_s: float | None = None,
        tenant: str = DEFAULT_TENANT,
        *,
        pinned: bool = False,
    ) -> Call:
        """Admit a request that arrived at `arrival`. The answer comes through `sink`.

        One that is `pinned` named its version: no other may answer it.

        The deadline is the request's `timeout` parameter, else the transport's header, else the
        model's default. Raises `InvalidRequest`, `Overloaded` or `Unavailable` without calling
        the sink.
        """
        level = request.priority or DEFAULT_PRIORITY
        if level > LOWEST_PRIORITY:
            arm.recorder.refused(InvalidRequest.slug, monotonic() - arrival)
            raise InvalidRequest(
                f"parameter 'priority' is {level}; allowed: 1 (most urgent) to {LOWEST_PRIORITY}, "
                f"or 0 for the default, {DEFAULT_PRIORITY}"
            )
        if request.timeout_us:
            timeout = request.timeout_us * 1e-6
        elif header_timeout_s is not None:
            timeout = header_timeout_s
        else:
            timeout = arm.arm.timeout_s
        deadline = arrival + min(timeout, MAX_TIMEOUT_S)
        call = Call(arm.stable, request, sink, arrival, deadline, level, tenant)
        call.pinned = pinned
        arm.admit(call)
        self.watch(call.deadline)
        return call

    def watch(self, deadline: float) -> None:
        """See to it that nobody waits past `deadline`."""
        if deadline < self._next_deadline:
            self._watch(deadline)

    def give_up(self) -> None:
        """Answer everything outstanding with `Unavailable`: the gateway ends."""
        for arm in self._batchers():
            for call in arm.outstanding():
                arm.forget(call)
                # No arm is to blame, and none is asked to help.
                call.trial = None
                call.fail(Unavailable("this gateway is shutting down", retry_after_s=1.0))

    def close(self) -> None:
        """Stop watching deadlines."""
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next_deadline = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - monotonic()), self._expire)

    def _expire(self) -> None:
        """Answer what is past its deadline, then sleep until the next one.

        Scanning all outstanding calls is cheap because it is rare: with a default timeout of 30 s
        the earliest outstanding deadline is almost always 30 s away. Where thousands of deadlines
        follow one another closely, the pause between two scans is at least so long that they take
        a tenth of the time.
        """
        started = monotonic()
        now = started + TICK_S
        earliest = math.inf
        late = []
        for arm in self._batchers():
            for call in arm.outstanding():
                if call.deadline <= now:
                    late.append(call)
                elif call.deadline < earliest:
                    earliest = call.deadline
        # First the next deadline: an answer may let in a request that brings an earlier one.
        self._timer = None
        self._next_deadline = math.inf
        if earliest < math.inf:
            ended = monotonic()
            self._watch(max(earliest, ended + 9 * (ended - started)))
        failing: dict[ArmBatcher, list[Call]] = {}
        for call in late:
            if call.hand_over():
                self.watch(call.deadline)
            else:
                failing.setdefault(call.arm, []).append(call)
        for arm, calls in failing.items():
            arm.blame(calls)
            for call in calls:
                arm.forget(call)
                call.fail(_late(call))


def in_time(calls: list[Call], now: float, replica: str) -> list[Call]:
    """Those that can still be answered in time; the others are told that they cannot.

    They waited for `replica`.
    """
    if all(call.deadline > now for call in calls):
        return calls
    late = [call for call in calls if call.deadline <= now]
    late = [call for call in late if not call.hand_over() or call.deadline <= now]
    together(late)
    for call in late:
        call.replica = replica
        call.fail(_late(call))
    return [call for call in calls if not call.done]


def error_of(slug: str, message: str) -> ServingError:
    """The error that a replica reported."""
    return _ERRORS.get(slug, ModelFailed)(message)


def _late(call: Call) -> DeadlineExceeded:
    where = "running" if call.sent else "waiting for a replica"
    budget_ms = (call.deadline - call.arrival) * 1e3
    return DeadlineExceeded(
        f"model {call.arm.arm.model!r} version {call.arm.arm.version}: no answer within "
        f"{budget_ms:.4g} ms; the request was {where}"
    )
