"""How a model's batches may be merged and padded."""

from __future__ import annotations

from dataclasses import dataclass

from serving.core.types import Batch
from serving.replica.backends.base import Backend


@dataclass(frozen=True, slots=True)
class BatchRules:
    """How batches may be merged and padded. `buckets` None: no padding."""

    max_size: int
    buckets: tuple[int, ...] | None = None

    @property
    def merge_size(self) -> int:
        """The most rows that are merged into one run: a larger run would have no bucket."""
        return min(self.max_size, self.buckets[-1]) if self.buckets else self.max_size

    def padded(self, rows: int) -> int:
        """The rows that a run of `rows` rows is padded to."""
        for bucket in self.buckets or ():
            if bucket >= rows:
                return bucket
        return rows

    def smaller(self, padded: int) -> int:
        """The rows of the next smaller run than one of `padded` rows, at least 2."""
        below = [b for b in self.buckets or () if b < padded]
        return below[-1] if below else padded // 2


def rules_for(
    backend: Backend, max_size: int, buckets: tuple[int, ...] | None = None
) -> BatchRules:
    """The rules that fit a model: its fixed rows, the buckets asked for, or powers of two on a GPU.

    On a GPU each new shape costs planning and memory, so the shapes are kept few.
    """
    signature = backend.signature
    if signature.batch is Batch.NONE:
        return BatchRules(1)
    if signature.batch is Batch.FIXED:
        return BatchRules(min(max_size, signature.fixed_rows), (signature.fixed_rows,))
    if buckets is None and backend.device != "cpu":
        powers = (1 << i for i in range((max_size - 1).bit_length()))
        buckets = (*powers, max_size)
    return BatchRules(max_size, buckets)
