"""Who may wait at one model version, and how long: for a batch, or for a replica to come."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from serving.core.batching import RequestQueue, ServiceModel
from serving.core.routing import Arm
from serving.errors import ServingError
from serving.gateway.infer import TICK_S, Call, monotonic
from serving.gateway.link_set import LinkSet
from serving.gateway.recorder import ArmRecorder
from serving.gateway.room import Room, no_replica
from serving.gateway.trials import blame


class Admission(ABC):
    """The queue of one version and its door; `ArmBatcher` empties it.

    A base class, as every request goes through it: a part of its own would cost each a hop more.
    """

    _max_rows: int

    def __init__(
        self,
        arm: Arm,
        recorder: ArmRecorder,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called when a request waits for a version that has no replica."""
        self.arm = arm
        self.recorder = recorder
        self._loop = loop
        self._ask_to_wake = wake
        self._queue: RequestQueue[Call] = RequestQueue()
        self._service = ServiceModel()
        self._links = LinkSet()
        self._room = Room(self._queue, self._service, self._links)
        self._hold: asyncio.TimerHandle | None = None
        self._down_since: float | None = None
        self._retired = False
        # Whether what waits is about to be sent.
        self._scheduled = False
        # Whether this version has left for good.
        self.closed = False
        # Whether a replica can take batches. A plain attribute: splits ask it for each request.
        self.ready = False

    def _schedule(self) -> None:
        """Send what waits at the end of this turn of the loop."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    @abstractmethod
    def _pump(self) -> None:
        """Send what waits, as far as there is who takes it."""

    @abstractmethod
    def _close_if_settled(self) -> None:
        """Close a version that leaves once nothing of it waits or runs."""

    @property
    def accepts(self) -> bool:
        """Whether requests are taken: a version that sleeps takes them until one wakes it."""
        return self.ready or (self._may_sleep and not self.closed)

    @property
    def _may_sleep(self) -> bool:
        """Whether a replica comes when one is asked for: not to a version that leaves."""
        return self.arm.wake_queue > 0 and not self._retired

    @property
    def waiting(self) -> int:
        """Requests waiting."""
        return len(self._queue)

    @property
    def queue_depth(self) -> int:
        """Rows waiting."""
        return self._queue.rows

    # Requests.

    def admit(self, call: Call) -> None:
        """Queue a call. Raises `Overloaded` or `Unavailable` instead of letting it wait in vain."""
        rows = self._queue.rows
        if self._down_since is not None or (
            rows
            and (
                rows + call.rows > self._room.rows
                or call.deadline - call.arrival < self.arm.queue_max_wait_s
            )
        ):
            try:
                self._check_room(call, rows, call.deadline)
            except ServingError as error:
                call.done = True
                self.recorder.refused(error.slug, monotonic() - call.arrival)
                raise
        self._queue.push(call)
        if not self._scheduled:
            self._schedule()

    def take(self, call: Call) -> None:
        """Queue a call for which there is room."""
        self._queue.push(call)
        if not self._scheduled:
            self._schedule()

    def spare_rows(self) -> int:
        """How many more rows may wait without a second thought; -1 where no replica is ready."""
        if not self.ready:
            return -1
        return self._room.rows - self._queue.rows

    def has_room(self, call: Call) -> bool:
        """Whether a call would be let in now, and could be answered in time."""
        rows, down = self._queue.rows, self._down_since is not None
        return not (rows or down) or self._has_room(call, rows, call.deadline)

    def has_room_behind(self, ahead: int, call: Call, deadline: float) -> bool:
        """Whether a call that has just arrived would be let in behind so many rows.

        And whether it could be answered by `deadline`.
        """
        if self._down_since is None and (
            not ahead
            or (
                ahead + call.rows <= self._room.rows
                and deadline - call.arrival >= self.arm.queue_max_wait_s
            )
        ):
            return True
        return self._has_room(call, ahead, deadline)

    def _has_room(self, call: Call, ahead: int, deadline: float) -> bool:
        try:
            self._check_room(call, ahead, deadline)
        except ServingError:
            return False
        return True

    def _check_room(self, call: Call, ahead: int, deadline: float) -> None:
        if self._down_since is not None and self._may_sleep:
            self._room.check_asleep(call, self.arm)
            if not self._queue:
                self._loop.call_soon(self._ask_to_wake)
            return
        if self._down_since is not None and self._hold is None:
            raise no_replica(self.arm)
        self._room.check(call, self.arm, self._max_rows, ahead, deadline)

    # Replicas.

    def _check_ready(self) -> None:
        """Note since when there is no replica, or that there is one."""
        if self.closed:
            return
        self._links.count()
        self._room.measure(self.arm, self._max_rows)
        self.ready = self._links.connected > 0
        if self.ready:
            self._down_since = None
            return
        if self._down_since is None:
            self._down_since = monotonic()
        if self._hold is None:
            self._hold_on()

    def _hold_on(self) -> None:
        """Let requests wait for a replica while `queue_hold_s` lasts, then answer them."""
        self._hold = None
        if self._down_since is None or self._may_sleep:
            # One that may sleep is waited for as long as each request can.
            return
        left = self._down_since + self.arm.queue_hold_s - monotonic()
        abandoned = self._retired and not self._links.by_endpoint
        if left > TICK_S and not abandoned:
            self._hold = self._loop.call_later(left, self._hold_on)
            return
        waiting = list(self._queue)
        self.blame(waiting)
        for call in waiting:
            self._queue.forget(call)
            call.fail(no_replica(self.arm))
        self._close_if_settled()

    def blame(self, late: list[Call]) -> None:
        """Note what requests of this version that are late share, and the replica they had."""
        some = next((e.replica for e in self._links.by_endpoint), "none")
        blame(late, list(self._links.batches()), list(self._queue), some)
