"""What a replica answered to a batch, ready to be handed out request by request."""

from __future__ import annotations

from collections.abc import Sequence

from serving.core.frames import TensorEntry
from serving.core.inference import EncodedResponse, InferRequest, OutputTensor
from serving.core.protocol import InferCodec
from serving.core.types import Batch, Signature
from serving.gateway.split import split_outputs


class BatchAnswer:
    """The outputs of one batch, and the times of its run. Valid while its tensors are.

    `queue` and `compute` are the replica's times in seconds, `rows` the batch's, `run_rows` those
    of the run, which may have held other gateways' batches too.
    """

    __slots__ = ("_bodies", "_codec", "_parts", "compute", "queue", "rows", "run_rows")

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
        self._codec = codec
        self._bodies: list[bytes] | None = None
        self._parts: list[list[OutputTensor]] = []
        if len(requests) > 1 and [e.index for e in entries] == list(range(len(entries))):
            self._bodies = codec.encode_batch(requests, [e.shape for e in entries], tensors)
        if self._bodies is None:
            batched = signature.batch is not Batch.NONE
            counts = [request.rows for request in requests]
            self._parts = split_outputs(
                signature.outputs, batched, counts, self.rows, entries, tensors
            )

    def response(self, position: int, request: InferRequest) -> EncodedResponse:
        """The response to the batch's request at `position`.

        Raises `ModelFailed` where an output does not fit the signature, `InvalidRequest` where it
        has no such form as was asked for.
        """
        if self._bodies is not None:
            return EncodedResponse(self._bodies[position])
        return self._codec.encode(request, self._parts[position])
