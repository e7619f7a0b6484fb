"""One model version at this gateway: its links, and the batches between its queue and them.

A batch leaves when a replica has a free connection, so an idle system adds no delay and a busy one
fills batches. Everything that arrived in one turn of the loop travels together, because dispatch is
scheduled at the end of the turn.

After the loss of a replica what it had is sent again as `suspects` does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

from serving.core.batching import SHADOW_LEVEL
from serving.core.frames import TensorEntry
from serving.core.inference import Limits, row_limit
from serving.core.protocol import InferCodec
from serving.core.routing import Arm, Endpoint
from serving.core.types import Batch
from serving.errors import DeadlineExceeded, ModelFailed
from serving.gateway.admission import Admission
from serving.gateway.answers import BatchAnswer, hand_out
from serving.gateway.infer import TICK_S, Call, error_of, in_time, monotonic
from serving.gateway.layouts import Buffer, OutgoingLayouts
from serving.gateway.link_set import Link
from serving.gateway.recorder import ArmRecorder
from serving.gateway.suspects import Suspects
from serving.gateway.trials import together


class ArmBatcher(Admission):
    """Dispatch for one version. All methods run on the loop."""

    def __init__(
        self,
        arm: Arm,
        recorder: ArmRecorder,
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called when a request waits for a version that has no replica."""
        super().__init__(arm, recorder, loop, wake)
        # Whose a call is until an arm is chosen for it; see `Splitter`.
        self.stable = self
        self._limits = limits
        self._suspects = Suspects(self._queue, self._links)
        self._delay: asyncio.TimerHandle | None = None
        self._batched = arm.signature.batch is not Batch.NONE
        self._layouts = OutgoingLayouts(arm.signature)
        self.configure(arm)
        # Until its first replica is connected a new version is like one that lost its last.
        self._check_ready()

    def configure(self, arm: Arm) -> None:
        """Take over the settings of a new route table; version and digest stay."""
        if self.arm.wake_queue and not arm.wake_queue and self._down_since is not None:
            # From now on there is to be a replica: it takes its time to come.
            self._down_since = monotonic()
        self.arm = arm
        self._bound_rows(arm.max_size)
        self.response_headers = (
            f"x-model-version: {arm.version}\r\nx-model-digest: {arm.digest}\r\n"
            f"x-arm: {arm.role}\r\n"
        ).encode()

    def _bound_rows(self, max_size: int) -> None:
        """Bound a request to `max_size` rows, and batches to what a replica runs as one."""
        arm = self.arm
        self._max_size = max_size
        rows = row_limit(arm.signature, max_size) or 1
        self._most_rows = rows
        self.codec = InferCodec(arm.model, arm.version, arm.signature, rows, self._limits)
        # Past the largest bucket a replica merges nothing: only one request alone may be larger.
        bucketed = arm.buckets and arm.signature.batch is Batch.DYNAMIC
        self._max_rows = min(rows, arm.buckets[-1]) if bucketed else rows
        self._max_items = self._max_rows if self._batched else 1

    @property
    def links(self) -> Mapping[Endpoint, Link]:
        """The links that there are, some of which drain perhaps."""
        return self._links.by_endpoint

    @property
    def replicas_connected(self) -> int:
        """Replicas that can take batches."""
        return self._links.connected

    @property
    def in_flight(self) -> int:
        """Requests at replicas, answered to their callers or not."""
        return sum(map(len, self._links.batches()))

    def outstanding(self) -> Iterator[Call]:
        """Every call that waits or runs and is not answered yet, as a snapshot."""
        running = chain.from_iterable(self._links.batches())
        return iter([c for c in chain(self._queue, running) if not c.done])

    def forget(self, call: Call) -> None:
        """Take a call that is done out of the queue, if it waits there."""
        if not call.sent:
            self._queue.forget(call)
            self._close_if_settled()

    # Dispatch.

    def _pump(self) -> None:
        self._scheduled = False
        self._dispatch()
        self._close_if_settled()

    def _dispatch(self) -> None:
        if self._queue.suspect_rows or self._links.reserved is not None:
            self._suspects.dispatch(self._take_suspects, self._send, self._send_batches)
        self._send_batches()

    def _send_batches(self) -> None:
        queue = self._queue
        while queue.rows != queue.suspect_rows:
            link = self._links.free()
            if link is None or (self.arm.max_delay_s and not self._due()):
                break
            self._send(link, queue.take(self._max_rows, self._max_items))

    def _take_suspects(self) -> list[Call]:
        return self._queue.take_suspects(self._max_rows, self._max_items)

    def _due(self) -> bool:
        """Whether a batch may leave under `max_delay`; if not, wake up when it may."""
        if self._queue.ripe(self._max_rows, self._max_items):
            return True
        oldest = min((c.arrival for c in self._queue if not c.suspect), default=0.0)
        wait = oldest + self.arm.max_delay_s - monotonic()
        if wait <= TICK_S:
            return True
        if self._delay is None:
            self._delay = self._loop.call_later(wait, self._wake)
        return False

    def _wake(self) -> None:
        self._delay = None
        self._pump()

    def _send(self, link: Link, batch: list[Call]) -> None:
        now = monotonic()
        rows = 0
        deadline = 0.0
        replica = link.endpoint.replica
        batch = in_time(batch, now, replica)
        if not batch:
            return
        for call in batch:
            call.sent = now
            call.replica = replica
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
        self._links.used(link)
        budget_us = max(1, int((deadline - now) * 1e6))
        link.send(batch, rows, budget_us, layout, pieces, alone=batch[0].suspect)

    # Links.

    def connect(
        self,
        endpoints: Sequence[Endpoint],
        make_link: Callable[[ArmBatcher, Endpoint], Link],
    ) -> None:
        """Make the links match the route table: new ones connect, missing ones drain.

        Where replicas are replaced, those that leave serve on until one of the new is connected:
        the controller keeps them until the gateways have applied the table, and replicas drain
        before they go.
        """
        self._links.follow(endpoints, partial(make_link, self), self.arm.max_size)
        self._let_go()
        self._check_ready()
        self._schedule()

    def _let_go(self) -> None:
        """Let links go that are needed no more, and bound batches by what those that stay take."""
        max_size = min([self.arm.max_size, *self._links.let_go()])
        if max_size != self._max_size:
            self._bound_rows(max_size)

    def retire(self, successor: ArmBatcher | None = None) -> None:
        """Take no new requests, finish the ones there are, then let the links go.

        Without a replica, those that may be any version's are handed to `successor`; the others
        wait for one that was about to come, as long as requests are held.
        """
        slept = self._may_sleep
        self._retired = True
        if self._down_since is not None:
            if successor is not None:
                self._hand_to(successor)
            if slept:
                self._down_since = monotonic()
            if self._hold is not None:
                self._hold.cancel()
            self._hold_on()
        self._close_if_settled()

    def _hand_to(self, successor: ArmBatcher) -> None:
        """Let `successor` have what waits, where it could just as well have been sent there."""
        if successor.arm.signature != self.arm.signature:
            return
        for call in sorted(self._queue, key=lambda c: c.arrival):
            tried = call.losses or call.trial is not None or call.level == SHADOW_LEVEL
            if call.pinned or tried or call.rows > successor._most_rows:
                continue
            if successor.has_room(call):
                self._queue.forget(call)
                call.arm = successor
                successor.take(call)

    def close(self) -> list[asyncio.Task[None]]:
        """Drop the links, and stop every timer. Returns what has yet to notice its cancellation."""
        self.closed, self.ready = True, False
        for timer in (self._delay, self._hold):
            if timer is not None:
                timer.cancel()
        return self._links.close()

    def _close_if_settled(self) -> None:
        if self._retired and not self.closed and not self._queue and not self.in_flight:
            self.close()

    def link_closed(self, link: Link) -> None:
        """A drained link is gone for good."""
        self._links.by_endpoint.pop(link.endpoint, None)

    def link_up(self, link: Link) -> None:
        """A replica can take batches."""
        self._let_go()
        self._check_ready()
        self._pump()

    def link_down(self, link: Link, lost: list[list[Call]]) -> None:
        """A replica is gone: send its requests elsewhere, as suspects."""
        count = sum(map(len, lost))
        for batch in lost:
            together(batch)
            self._suspects.add(batch, count, self.arm)
        self._let_go()
        self._check_ready()
        if not self.ready:
            # Their clients need not wait for a replica to come.
            for call in list(self._queue):
                call.hand_over()
        self._pump()

    # Answers.

    def batch_done(
        self,
        link: Link,
        batch: list[Call],
        head: tuple[int, int, int, int, int],
        entries: Sequence[TensorEntry],
        tensors: Sequence[memoryview],
    ) -> None:
        """Give every caller its rows, and the replica its next batch first."""
        requests = [call.request for call in batch]
        _, rows, run_rows, _, compute_us = head
        self._service.observe(run_rows, compute_us * 1e-6)
        self._room.measure(self.arm, self._max_rows)
        if batch[0].level != SHADOW_LEVEL:
            self.recorder.batch_size.add(rows)
        if self._queue:
            # No more than that: while this batch is in hand, a version that leaves has not settled.
            self._dispatch()
        try:
            answer = BatchAnswer(self.codec, self.arm.signature, requests, head, entries, tensors)
        except ModelFailed as error:
            self.batch_failed(link, batch, ModelFailed.slug, str(error))
            return
        hand_out(batch, answer, self.arm, self.recorder, link.endpoint.replica)
        self._close_if_settled()

    def batch_failed(self, link: Link, batch: list[Call], slug: str, message: str) -> None:
        """Tell the caller; of several, run each again alone, so that only the guilty one fails."""
        error = error_of(slug, f"model {self.arm.model!r} version {self.arm.version}: {message}")
        # Whatever the model said of the batch, it may hold for one of its requests only. Copies
        # are not worth the runs.
        again = len(batch) > 1 and slug != DeadlineExceeded.slug and batch[0].level != SHADOW_LEVEL
        together(batch)
        for call in batch:
            if call.done:
                continue
            if again:
                call.sent = 0.0
                # The replica outlived it.
                call.suspect = False
                self._queue.push_rerun(call)
            else:
                call.fail(error)
        self._check_ready()
        self._pump()
