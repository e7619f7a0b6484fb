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

    __slots__ = (
        "_bodies",
        "_codec",
        "_entries",
        "_parts",
        "_requests",
        "_signature",
        "_tensors",
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
