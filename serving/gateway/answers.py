"""What a replica answered to a batch, and how it is handed out, request by request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.core.batching import SHADOW_LEVEL
from serving.core.cost import direct_cost, format_usd
from serving.core.frames import TensorEntry
from serving.core.inference import EncodedResponse, InferRequest, OutputTensor
from serving.core.protocol import InferCodec
from serving.core.routing import Arm
from serving.core.types import Batch, Signature
from serving.errors import ServingError
from serving.gateway.split import split_outputs
from serving.gateway.trials import together
from serving.gateway.usage import DIRECT, FAILED, NOBODY, SHADOW

if TYPE_CHECKING:
    from serving.gateway.infer import Call
    from serving.gateway.recorder import ArmRecorder
    from serving.gateway.usage import UsageMeter

log = logging.getLogger(__name__)


class BatchAnswer:
    """The outputs of one batch, and the times of its run. Valid while its tensors are.

    `queue` and `compute` are the replica's times in seconds, `rows` the batch's, `run_rows` those
    of the run, which may have held other gateways' batches too. `busy_ns` is the part of the run
    that was for these rows, in nanoseconds, as the replica counts it.
    """

    __slots__ = (
        "_bodies",
        "_codec",
        "_cost",
        "_cost_rows",
        "_entries",
        "_parts",
        "_requests",
        "_signature",
        "_tensors",
        "busy_ns",
        "compute",
        "queue",
        "rows",
        "run_rows",
    )

    def __init__(
        self,
        codec: InferCodec,
        signature: Signature,
        requests: Sequence[InferRequest],
        head: tuple[int, int, int, int, int],
        entries: Sequence[TensorEntry],
        tensors: Sequence[memoryview],
    ) -> None:
        """`head` is RESULT's. Raises `ModelFailed` where the rows do not add up."""
        _, self.rows, self.run_rows, queue_us, compute_us = head
        self.queue, self.compute = queue_us * 1e-6, compute_us * 1e-6
        self.busy_ns = compute_us * 1000 * self.rows // self.run_rows if self.run_rows else 0
        self._cost, self._cost_rows = b"", 0
        self._codec = codec
        self._signature = signature
        self._requests, self._entries, self._tensors = requests, entries, tensors
        self._bodies: list[bytes] | None = None
        self._parts: list[list[OutputTensor]] | None = None
        if len(requests) > 1 and [e.index for e in entries] == list(range(len(entries))):
            self._bodies = codec.encode_batch(requests, [e.shape for e in entries], tensors)
        if self._bodies is None:
            self._parts = self._split()

    def _split(self) -> list[list[OutputTensor]]:
        signature = self._signature
        batched = signature.batch is not Batch.NONE
        counts = [request.rows for request in self._requests]
        return split_outputs(
            signature.outputs, batched, counts, self.rows, self._entries, self._tensors
        )

    def cost(self, usd_per_hour: float, rows: int) -> bytes:
        """What `rows` of this batch cost on a replica of that price, in USD as decimal text."""
        if rows != self._cost_rows:
            # Most requests have as many rows as the one before.
            nano = direct_cost(usd_per_hour, self.compute, rows, self.run_rows)
            self._cost, self._cost_rows = format_usd(nano).encode(), rows
        return self._cost

    def response(self, position: int, request: InferRequest) -> EncodedResponse:
        """The response to the batch's request at `position`.

        Raises `ModelFailed` where an output does not fit the signature, `InvalidRequest` where it
        has no such form as was asked for.
        """
        if self._bodies is not None:
            return EncodedResponse(self._bodies[position])
        return self._codec.encode(request, self.outputs(position))

    def outputs(self, position: int) -> list[OutputTensor]:
        """All outputs for the batch's request at `position`, in the signature's order."""
        if self._parts is None:
            self._parts = self._split()
        return self._parts[position]

    def output(self, index: int) -> tuple[tuple[int, ...], memoryview]:
        """An output of the signature for the whole batch: shape and raw form."""
        return self._entries[index].shape, self._tensors[index]


def hand_out(
    batch: list[Call], answer: BatchAnswer, arm: Arm, recorder: ArmRecorder, replica: str
) -> None:
    """Give every caller that still waits its part of what `replica` answered."""
    # By position, how long those took that are answered now; of the others it means nothing.
    latencies: list[float] = []
    # Calls that this answer comes too late for, or is of no use to.
    missed: set[int] = set()
    for position, call in enumerate(batch):
        if call.done:
            missed.add(position)
            latencies.append(0.0)
            continue
        call.done = True
        try:
            finished = call.sink.answered(call, answer, position)
        except ServingError as error:
            missed.add(position)
            finished = 0.0
            _undelivered(batch, call, error)
        except Exception:
            missed.add(position)
            finished = 0.0
            # One answer that cannot be written must not cost its batch-mates theirs.
            log.exception("an answer of model %s could not be delivered", arm.model)
            failure = ServingError("internal error while the answer was written")
            _undelivered(batch, call, failure)
        latencies.append(finished - call.arrival)
    _count(batch, answer, latencies, missed, recorder, replica)


def _count(
    batch: list[Call],
    answer: BatchAnswer,
    latencies: list[float],
    missed: set[int],
    recorder: ArmRecorder,
    replica: str,
) -> None:
    """Count a batch of which all but those `missed` were answered, after so many seconds each."""
    trials = {call.trial for call in batch}
    wasted: list[Call] = []
    seen, taken = batch, latencies
    if missed or True in [call.unseen for call in batch]:
        wasted = [call for i, call in enumerate(batch) if i in missed or call.unseen]
        kept = [i for i, call in enumerate(batch) if i not in missed and not call.unseen]
        seen, taken = [batch[i] for i in kept], [latencies[i] for i in kept]
    recorder.answered(taken, [c.sent - c.arrival + answer.queue for c in seen], answer.compute)
    _count_usage(recorder.usage, replica, batch, answer, wasted)
    for trial in trials:
        if trial is None:
            continue
        if len(trials) == 1 and not missed:
            trial.batch_answered(replica, batch, range(len(batch)), latencies, answer)
            continue
        own = [i for i, call in enumerate(batch) if call.trial is trial and i not in missed]
        if own:
            trial.batch_answered(replica, batch, own, [latencies[i] for i in own], answer)


def _count_usage(
    usage: UsageMeter, replica: str, batch: list[Call], answer: BatchAnswer, wasted: list[Call]
) -> None:
    """Charge the batch's part of the run to those whom it was for."""
    ns, requests = answer.busy_ns, len(batch)
    if batch[0].level == SHADOW_LEVEL:
        usage.add(replica, NOBODY, SHADOW, ns, requests)
        return
    if usage.tenant is None:
        _count_by_tenant(usage, replica, batch, ns, wasted)
        return
    if wasted:
        # Not by the rows that the replica says it had: it may be wrong.
        rows = sum(call.rows for call in batch)
        lost = ns * sum(call.rows for call in wasted) // (rows or 1)
        usage.add(replica, usage.tenant, FAILED, lost, len(wasted))
        ns, requests = ns - lost, requests - len(wasted)
    if requests:
        usage.add(replica, usage.tenant, DIRECT, ns, requests)


def _count_by_tenant(
    usage: UsageMeter, replica: str, batch: list[Call], ns: int, wasted: list[Call]
) -> None:
    """Charge each tenant for its rows of the run. The parts add up to `ns`."""
    lost = set(map(id, wasted)) if wasted else ()
    shares: dict[tuple[str, str], list[int]] = {}
    rows = 0
    for call in batch:
        rows += call.rows
        source = call.tenant, FAILED if id(call) in lost else DIRECT
        share = shares.get(source)
        if share is None:
            share = shares[source] = [0, 0]
        share[0] += call.rows
        share[1] += 1
    upto = done = 0
    for (tenant, kind), (own, requests) in shares.items():
        upto += own
        # Rounded as a sum, so that nothing is lost; a batch without rows is the first's.
        end = ns * upto // rows if rows else ns
        usage.add(replica, tenant, kind, end - done, requests)
        done = end


def _undelivered(batch: list[Call], call: Call, error: ServingError) -> None:
    """Fail a request whose answer cannot be handed out."""
    together(batch)
    call.done = False
    call.fail(error)
