"""One model version at this gateway: its queue, its links, and the batches between them.

A batch leaves when a replica has a free connection, so an idle system adds no delay and a busy one
fills batches. Everything that arrived in one turn of the loop travels together, because dispatch is
scheduled at the end of the turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Final

from serving.core.batching import RequestQueue, ServiceModel
from serving.core.frames import TensorEntry
from serving.core.inference import Limits
from serving.core.protocol import InferCodec
from serving.core.routing import Arm, Endpoint
from serving.core.types import Batch
from serving.errors import DeadlineExceeded, ModelFailed, Overloaded, ServingError, Unavailable
from serving.gateway.infer import TICK_S, Call, Timing, error_of, in_time, monotonic
from serving.gateway.layouts import Buffer, OutgoingLayouts
from serving.gateway.links import ReplicaLink
from serving.gateway.recorder import ArmRecorder
from serving.gateway.split import split_outputs

log = logging.getLogger(__name__)

MAX_SENDS: Final = 2


class ArmBatcher:
    """Queue and dispatch for one version. All methods run on the loop."""

    def __init__(
        self, arm: Arm, recorder: ArmRecorder, limits: Limits, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.arm = arm
        self.recorder = recorder
        self.links: dict[Endpoint, ReplicaLink[list[Call]]] = {}
        self._loop = loop
        self._limits = limits
        self._queue: RequestQueue[Call] = RequestQueue()
        self._service = ServiceModel()
        self._scheduled = False
        self._delay: asyncio.TimerHandle | None = None
        self._hold: asyncio.TimerHandle | None = None
        self._retired = False
        # Whether this version has left for good.
        self.closed = False
        self._turn = 0
        self._batched = arm.signature.batch is not Batch.NONE
        self._layouts = OutgoingLayouts(arm.signature)
        # So many rows may wait without a second thought; see `_set_room`.
        self._room = 0
        self._connected = 0
        self.configure(arm)
        # Until its first replica is connected a new version is like one that lost its last.
        self._down_since: float | None = None
        self._check_ready()

    def configure(self, arm: Arm) -> None:
        """Take over the settings of a new route table; version and digest stay."""
        rows = arm.max_size
        if arm.signature.batch is Batch.FIXED:
            rows = min(rows, arm.signature.fixed_rows)
        self.arm = arm
        self._max_rows = rows
        self._max_items = rows if self._batched else 1
        self.codec = InferCodec(arm.model, arm.version, arm.signature, rows, self._limits)
        self.response_headers = (
            f"x-model-version: {arm.version}\r\nx-model-digest: {arm.digest}\r\n"
            f"x-arm: {arm.role}\r\n"
        ).encode()

    @property
    def ready(self) -> bool:
        """Whether a replica can take batches."""
        return self._down_since is None

    @property
    def replicas_connected(self) -> int:
        """Replicas that can take batches."""
        return self._connected

    @property
    def queue_depth(self) -> int:
        """Rows waiting."""
        return self._queue.rows

    @property
    def in_flight(self) -> int:
        """Requests at replicas, answered to their callers or not."""
        return sum(len(b) for link in self.links.values() for b in link.batches())

    def outstanding(self) -> Iterator[Call]:
        """Every call that waits or runs and is not answered yet, as a snapshot."""
        running = chain.from_iterable(b for link in self.links.values() for b in link.batches())
        return iter([c for c in chain(self._queue, running) if not c.done])

    # Admission.

    def admit(self, call: Call) -> None:
        """Queue a call. Raises `Overloaded` or `Unavailable` instead of letting it wait in vain."""
        rows = self._queue.rows
        if self._down_since is not None or (
            rows
            and (
                rows + call.rows > self._room
                or call.deadline - call.arrival < self.arm.queue_max_wait_s
            )
        ):
            try:
                self._check_room(call)
            except ServingError as error:
                call.done = True
                self.recorder.refused(error.slug, monotonic() - call.arrival)
                raise
        self._queue.push(call)
        self._schedule()

    def _check_room(self, call: Call) -> None:
        arm = self.arm
        if self._down_since is not None and self._hold is None:
            raise self._unavailable()
        if self._queue.rows + call.rows > arm.queue_max_rows:
            raise Overloaded(
                f"model {arm.model!r} version {arm.version}: {self._queue.rows} rows are waiting, "
                f"at most {arm.queue_max_rows} may",
                retry_after_s=1.0,
            )
        wait = self._service.drain(self._queue.rows, self._max_rows) / max(1, self._connected)
        allowed = min(arm.queue_max_wait_s, call.deadline - monotonic())
        if wait > allowed:
            raise Overloaded(
                f"model {arm.model!r} version {arm.version}: the estimated wait is "
                f"{wait * 1e3:.0f} ms, at most {max(0.0, allowed) * 1e3:.0f} ms is allowed",
                retry_after_s=wait,
            )

    def _set_room(self) -> None:
        """Work out how many rows may wait before a newcomer's wait has to be estimated."""
        arm = self.arm
        run = self._service.predict(self._max_rows)
        room = arm.queue_max_rows
        if run > 0.0:
            batches = int(arm.queue_max_wait_s * self._connected / run)
            room = min(room, batches * self._max_rows)
        self._room = room

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            f"model {self.arm.model!r} version {self.arm.version}: no replica is ready",
            retry_after_s=2.0,
        )

    def forget(self, call: Call) -> None:
        """Take a call that is done out of the queue, if it waits there."""
        if not call.sent:
            self._queue.forget(call)
            self._close_if_settled()

    # Dispatch.

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        queue = self._queue
        while queue:
            again = queue.again
            link = self._free_link(alone=again is not None and again.suspect)
            if link is None or (self.arm.max_delay_s and not self._due()):
                break
            self._send(link, queue.take(self._max_rows, self._max_items))
        self._close_if_settled()

    def _due(self) -> bool:
        """Whether a batch may leave under `max_delay`; if not, wake up when it may."""
        if self._queue.ripe(self._max_rows, self._max_items):
            return True
        oldest = min((c.arrival for c in self._queue), default=0.0)
        wait = oldest + self.arm.max_delay_s - monotonic()
        if wait <= TICK_S:
            return True
        if self._delay is None:
            self._delay = self._loop.call_later(wait, self._wake)
        return False

    def _wake(self) -> None:
        self._delay = None
        self._pump()

    def _free_link(self, alone: bool) -> ReplicaLink[list[Call]] | None:
        """The connected replica with the fewest batches in flight, in turn among equals.

        With `alone`, one that has none, and will get no other until it has answered.
        """
        best = None
        least = oldest = 0
        self._turn += 1
        for link in self.links.values():
            if not link.can_take(alone):
                continue
            load = link.in_flight
            if best is None or load < least or (load == least and link.turn < oldest):
                best, least, oldest = link, load, link.turn
        return best

    def _send(self, link: ReplicaLink[list[Call]], batch: list[Call]) -> None:
        now = monotonic()
        rows = 0
        deadline = 0.0
        batch = in_time(batch, now)
        if not batch:
            return
        for call in batch:
            call.sent = now
            call.attempts += 1
            rows += call.rows
            if call.deadline > deadline:
                deadline = call.deadline
        requests = [call.request for call in batch]
        layout = self._layouts.of(rows, requests)
        pieces: list[Buffer] = []
        for i, pad in enumerate(layout.pads):
            pieces += [request.inputs[i] for request in requests]
            if pad:
                pieces.append(pad)
        link.turn = self._turn
        budget_us = max(1, int((deadline - now) * 1e6))
        link.send(batch, rows, budget_us, layout, pieces, alone=batch[0].suspect)

    # Links.

    def connect(
        self,
        endpoints: Sequence[Endpoint],
        make_link: Callable[[ArmBatcher, Endpoint], ReplicaLink[list[Call]]],
    ) -> None:
        """Make the links match the route table: new ones connect, missing ones drain."""
        for endpoint in endpoints:
            if link := self.links.get(endpoint):
                link.undrain()
            else:
                self.links[endpoint] = make_link(self, endpoint)
                self.links[endpoint].start()
        for endpoint in self.links.keys() - set(endpoints):
            self.links[endpoint].drain()
        self._check_ready()
        self._schedule()

    def retire(self) -> None:
        """Take no new requests, finish the ones there are, then let the links go."""
        self._retired = True
        self._close_if_settled()

    def close(self) -> list[asyncio.Task[None]]:
        """Drop the links, and stop every timer. Returns what has yet to notice its cancellation."""
        self.closed = True
        for timer in (self._delay, self._hold):
            if timer is not None:
                timer.cancel()
        links, self.links = self.links, {}
        self._connected = 0
        return [task for link in links.values() if (task := link.close()) is not None]

    def _close_if_settled(self) -> None:
        if self._retired and not self.closed and not self._queue and not self.in_flight:
            self.close()

    def link_closed(self, link: ReplicaLink[list[Call]]) -> None:
        """A drained link is gone for good."""
        self.links.pop(link.endpoint, None)

    def link_up(self, link: ReplicaLink[list[Call]]) -> None:
        """A replica can take batches."""
        self._check_ready()
        self._pump()

    def link_down(self, link: ReplicaLink[list[Call]], lost: list[list[Call]]) -> None:
        """A replica is gone: send its requests elsewhere, once.

        Any of them may be what killed it. So each is sent alone, to a replica that has nothing else
        to do: the one that kills that one too takes no other request with it.
        """
        for call in chain.from_iterable(lost):
            if call.done:
                continue
            if call.attempts < MAX_SENDS:
                call.sent = 0.0
                call.suspect = True
                self._queue.push_again(call)
                continue
            call.fail(
                Unavailable(
                    f"model {self.arm.model!r} version {self.arm.version}: the replica was "
                    f"lost during the run, {MAX_SENDS} times in a row",
                    retry_after_s=1.0,
                )
            )
        self._check_ready()
        self._pump()

    def _check_ready(self) -> None:
        """Note since when there is no replica, or that there is one."""
        if self.closed:
            return
        self._connected = sum(link.up for link in self.links.values())
        self._set_room()
        if self._connected:
            self._down_since = None
            return
        if self._down_since is None:
            self._down_since = monotonic()
        if self._hold is None:
            self._hold_on()

    def _hold_on(self) -> None:
        """Let requests wait for a replica while `queue_hold_s` lasts, then answer them."""
        self._hold = None
        if self._down_since is None:
            return
        left = self._down_since + self.arm.queue_hold_s - monotonic()
        if left > TICK_S:
            self._hold = self._loop.call_later(left, self._hold_on)
            return
        for call in list(self._queue):
            self._queue.forget(call)
            call.fail(self._unavailable())
        self._close_if_settled()

    # Answers.

    def batch_done(
        self,
        batch: list[Call],
        head: tuple[int, int, int, int, int],
        entries: Sequence[TensorEntry],
        tensors: Sequence[memoryview],
    ) -> None:
        """Give every caller its rows, and the replica its next batch first."""
        _, rows, run_rows, queue_us, compute_us = head
        compute, replica_queue = compute_us * 1e-6, queue_us * 1e-6
        self._service.observe(run_rows, compute)
        self._set_room()
        self.recorder.batch_size.add(rows)
        if self._queue:
            self._pump()
        counts = [call.rows for call in batch]
        try:
            parts = split_outputs(
                self.arm.signature.outputs, self._batched, counts, rows, entries, tensors
            )
        except ModelFailed as error:
            self.batch_failed(batch, ModelFailed.slug, str(error))
            return
        for call, outputs in zip(batch, parts, strict=True):
            if call.done:
                continue
            call.done = True
            queue = call.sent - call.arrival + replica_queue
            try:
                finished = call.sink.answered(
                    call, outputs, Timing(queue, compute, call.rows, run_rows)
                )
            except ServingError as error:
                call.done = False
                call.fail(error)
            except Exception:
                # One answer that cannot be written must not cost its batch-mates theirs.
                log.exception("an answer of model %s could not be delivered", self.arm.model)
                call.done = False
                call.fail(ServingError("internal error while the answer was written"))
            else:
                self.recorder.answered(finished - call.arrival, queue, compute)
        self._close_if_settled()

    def batch_failed(self, batch: list[Call], slug: str, message: str) -> None:
        """Tell the caller; of several, run each again alone, so that only the guilty one fails."""
        error = error_of(slug, f"model {self.arm.model!r} version {self.arm.version}: {message}")
        # Whatever the model said of the batch, it may hold for one of its requests only.
        again = len(batch) > 1 and slug != DeadlineExceeded.slug
        for call in batch:
            if call.done:
                continue
            if again and call.attempts < MAX_SENDS:
                call.sent = 0.0
                self._queue.push_again(call)
            else:
                call.fail(error)
        self._check_ready()
        self._pump()
