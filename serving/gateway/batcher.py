"""One model version at this gateway: its queue, its links, and the batches between them.

A batch leaves when a replica has a free connection, so an idle system adds no delay and a busy one
fills batches. Everything that arrived in one turn of the loop travels together, because dispatch is
scheduled at the end of the turn.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Final

from serving.core.batching import RequestQueue, ServiceModel
from serving.core.frames import TensorEntry
from serving.core.inference import Limits, OutputTensor
from serving.core.protocol import InferCodec
from serving.core.routing import Arm, Endpoint
from serving.core.types import DATATYPES, Batch
from serving.errors import ModelFailed, Overloaded, ServingError, Unavailable
from serving.gateway.infer import Call, Timing, monotonic
from serving.gateway.links import ReplicaLink
from serving.gateway.recorder import ArmRecorder

log = logging.getLogger(__name__)

MAX_SENDS: Final = 2
_LENGTH: Final = struct.Struct("<I")


class ArmBatcher:
    """Queue and dispatch for one version. All methods run on the loop."""

    def __init__(
        self, arm: Arm, recorder: ArmRecorder, limits: Limits, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.arm = arm
        self.recorder = recorder
        self.links: dict[str, ReplicaLink[list[Call]]] = {}
        self._loop = loop
        self._limits = limits
        self._queue: RequestQueue[Call] = RequestQueue()
        self._service = ServiceModel()
        self._scheduled = False
        self._delay: asyncio.TimerHandle | None = None
        self._retired = False
        self._turn = 0
        self._byte_outputs = [t.datatype == "BYTES" for t in arm.signature.outputs]
        self._batched = arm.signature.batch is not Batch.NONE
        self.configure(arm)
        # Until its first replica is connected a new version is like one that lost its last.
        self._down_since: float | None = None
        self._went_down()

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
        """Whether a replica is connected."""
        return any(link.up for link in self.links.values())

    @property
    def replicas_connected(self) -> int:
        """Replicas that can take batches."""
        return sum(link.up for link in self.links.values())

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
        queue = self._queue
        if queue.rows or not self.ready:
            try:
                self._check_room(call)
            except ServingError as error:
                call.done = True
                self.recorder.refused(error.slug, monotonic() - call.arrival)
                raise
        queue.push(call)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _check_room(self, call: Call) -> None:
        arm = self.arm
        up = self.replicas_connected
        if not up:
            down_since = self._down_since
            if down_since is None or monotonic() - down_since >= arm.queue_hold_s:
                raise self._unavailable()
        if self._queue.rows + call.rows > arm.queue_max_rows:
            raise Overloaded(
                f"model {arm.model!r} version {arm.version}: {self._queue.rows} rows are waiting, "
                f"at most {arm.queue_max_rows} may",
                retry_after_s=1.0,
            )
        wait = self._service.drain(self._queue.rows, self._max_rows) / max(1, up)
        allowed = min(arm.queue_max_wait_s, call.deadline - monotonic())
        if wait > allowed:
            raise Overloaded(
                f"model {arm.model!r} version {arm.version}: the estimated wait is "
                f"{wait * 1e3:.0f} ms, at most {max(0.0, allowed) * 1e3:.0f} ms is allowed",
                retry_after_s=wait,
            )

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            f"model {self.arm.model!r} version {self.arm.version}: no replica is ready",
            retry_after_s=2.0,
        )

    def forget(self, call: Call) -> None:
        """Take a call that is done out of the queue's count, if it waits there."""
        if not call.sent:
            self._queue.forget(call)

    # Dispatch.

    def _pump(self) -> None:
        self._scheduled = False
        queue = self._queue
        while queue and (link := self._free_link()) is not None:
            if self.arm.max_delay_s and not self._due():
                return
            batch = queue.take(self._max_rows, self._max_items)
            if batch:
                self._send(link, batch)
        if self._retired and not queue:
            for link in self.links.values():
                link.drain()

    def _due(self) -> bool:
        """Whether a batch may leave under `max_delay`; if not, wake up when it may."""
        if self._queue.ripe(self._max_rows):
            return True
        oldest = min((c.arrival for c in self._queue), default=0.0)
        wait = oldest + self.arm.max_delay_s - monotonic()
        if wait <= 0.001:
            return True
        if self._delay is None:
            self._delay = self._loop.call_later(wait, self._wake)
        return False

    def _wake(self) -> None:
        self._delay = None
        self._pump()

    def _free_link(self) -> ReplicaLink[list[Call]] | None:
        """The connected replica with the fewest batches in flight, in turn among equals."""
        best = None
        least = 1 << 30
        links = list(self.links.values())
        self._turn += 1
        start = self._turn % len(links) if links else 0
        for link in links[start:] + links[:start]:
            if link.idle and link.up and not link.draining and link.in_flight < least:
                best, least = link, link.in_flight
        return best

    def _send(self, link: ReplicaLink[list[Call]], batch: list[Call]) -> None:
        now = monotonic()
        rows = 0
        deadline = 0.0
        for call in batch:
            call.sent = now
            call.attempts += 1
            rows += call.rows
            deadline = max(deadline, call.deadline)
        first = batch[0].request
        tensors = []
        for i, spec in enumerate(self.arm.signature.inputs):
            pieces = [call.request.inputs[i] for call in batch]
            shape = first.shapes[i]
            if self._batched:
                shape = (rows, *shape[1:])
            nbytes = sum(len(piece) for piece in pieces)
            tensors.append((TensorEntry(i, spec.datatype, shape, nbytes), pieces))
        link.send(batch, rows, max(1, int((deadline - now) * 1e6)), tensors)

    # Links.

    def connect(
        self,
        endpoints: Sequence[Endpoint],
        make_link: Callable[[ArmBatcher, Endpoint], ReplicaLink[list[Call]]],
    ) -> None:
        """Make the links match the route table: new ones connect, missing ones drain."""
        wanted = {e.replica: e for e in endpoints}
        for replica, endpoint in wanted.items():
            if replica not in self.links:
                self.links[replica] = make_link(self, endpoint)
                self.links[replica].start()
            self.links[replica].draining = False
        for replica in self.links.keys() - wanted.keys():
            self.links[replica].drain()

    def retire(self) -> None:
        """Take no new requests, finish the ones there are, then let the links go."""
        self._retired = True
        self._pump()

    def link_closed(self, link: ReplicaLink[list[Call]]) -> None:
        """A drained link is gone for good."""
        self.links.pop(link.endpoint.replica, None)

    def link_up(self, link: ReplicaLink[list[Call]]) -> None:
        """A replica can take batches."""
        self._down_since = None
        self._pump()

    def link_down(self, link: ReplicaLink[list[Call]], lost: list[list[Call]]) -> None:
        """A replica is gone: send its requests elsewhere, once, each alone."""
        if not self.ready:
            self._went_down()
        for call in chain.from_iterable(lost):
            if call.done:
                continue
            if call.attempts >= MAX_SENDS:
                call.fail(
                    Unavailable(
                        f"model {self.arm.model!r} version {self.arm.version}: the replica was "
                        f"lost during the run, {MAX_SENDS} times in a row",
                        retry_after_s=1.0,
                    )
                )
            else:
                call.sent = 0.0
                self._queue.push_again(call)
        self._pump()

    def _went_down(self) -> None:
        if self._down_since is None:
            self._down_since = monotonic()
            self._loop.call_later(self.arm.queue_hold_s, self._give_up_waiting)

    def _give_up_waiting(self) -> None:
        if self._down_since is None:
            return
        if monotonic() - self._down_since < self.arm.queue_hold_s - 0.001:
            return
        for call in list(self._queue):
            call.fail(self._unavailable())
            self._queue.forget(call)

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
        compute = compute_us * 1e-6
        self._service.observe(run_rows, compute)
        self.recorder.batch_size.add(run_rows)
        if self._queue:
            self._pump()
        try:
            parts = self._split(batch, rows, entries, tensors)
        except (ModelFailed, struct.error, IndexError) as error:
            self.batch_failed(batch, ModelFailed.slug, str(error))
            return
        for call, outputs in zip(batch, parts, strict=True):
            if call.done:
                continue
            call.done = True
            queue = call.sent - call.arrival + queue_us * 1e-6
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

    def batch_failed(self, batch: list[Call], slug: str, message: str) -> None:
        """Tell the caller; of several, run each again alone, so that only the guilty one fails."""
        error = _error(slug, f"model {self.arm.model!r} version {self.arm.version}: {message}")
        again = len(batch) > 1 and slug == ModelFailed.slug
        for call in batch:
            if call.done:
                continue
            if again and call.attempts < MAX_SENDS:
                call.sent = 0.0
                self._queue.push_again(call)
            else:
                call.fail(error)
        self._pump()

    def _split(
        self,
        batch: list[Call],
        rows: int,
        entries: Sequence[TensorEntry],
        tensors: Sequence[memoryview],
    ) -> list[list[OutputTensor]]:
        """Each call's slice of every output. Raises `ModelFailed` where the rows do not add up."""
        expected = sum(call.rows for call in batch)
        specs = self.arm.signature.outputs
        if [e.index for e in entries] != list(range(len(specs))):
            raise ModelFailed(f"{len(entries)} outputs came back, expected {len(specs)}")
        parts: list[list[OutputTensor]] = [[] for _ in batch]
        for entry, data in zip(entries, tensors, strict=True):
            if not self._batched or len(batch) == 1:
                parts[0].append(OutputTensor(entry.index, entry.shape, data))
                continue
            if rows != expected or not entry.shape or entry.shape[0] != rows:
                raise ModelFailed(
                    f"output {specs[entry.index].name!r} has shape {list(entry.shape)} "
                    f"for a batch of {expected} rows"
                )
            tail = entry.shape[1:]
            at = 0
            if self._byte_outputs[entry.index]:
                width = _product(tail)
                for part, call in zip(parts, batch, strict=True):
                    end = _skip_elements(data, at, call.rows * width)
                    part.append(OutputTensor(entry.index, (call.rows, *tail), data[at:end]))
                    at = end
                continue
            step = DATATYPES[entry.datatype].itemsize * _product(tail)
            for part, call in zip(parts, batch, strict=True):
                end = at + step * call.rows
                part.append(OutputTensor(entry.index, (call.rows, *tail), data[at:end]))
                at = end
        return parts


def _product(shape: Sequence[int]) -> int:
    product = 1
    for dim in shape:
        product *= dim
    return product


def _skip_elements(data: memoryview, at: int, count: int) -> int:
    """The offset behind `count` BYTES elements. Raises `struct.error` past the end."""
    for _ in range(count):
        at += 4 + int(_LENGTH.unpack_from(data, at)[0])
    return at


_ERRORS: Final = {cls.slug: cls for cls in ServingError.__subclasses__()}


def _error(slug: str, message: str) -> ServingError:
    return _ERRORS.get(slug, ModelFailed)(message)
