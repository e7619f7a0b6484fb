"""Runs that do not fit into memory: what is learned from them, and their rows in smaller runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from serving.core.types import Batch
from serving.errors import OutOfMemory
from serving.replica.backends.base import Array, Backend
from serving.replica.backends.faults import MemoryExhausted
from serving.replica.ceiling import NO_LIMIT, Ceiling
from serving.replica.rules import BatchRules

_log = logging.getLogger(__name__)

Run = Callable[[list[Array], int], tuple[list[Array], float]]
"""Inputs and the rows to pad them to; gives the outputs for the inputs' rows, and seconds."""

EXHAUSTED: Final = (MemoryExhausted, MemoryError)
"""What a run raises where fewer rows might fit: the device's memory, or this machine's."""


class MemoryFit:
    """What is known of the runs of one backend that fit into memory.

    `usual_row_bytes` is the size of a usual row of input: `ceiling` is told for such rows, and a
    request of uncommonly large ones says nothing about them. One thread at a time may run or learn.
    """

    def __init__(
        self, backend: Backend, rules: BatchRules, ceiling: int | None, usual_row_bytes: int
    ) -> None:
        self._backend = backend
        self._rules = rules
        self._dynamic = backend.signature.batch is Batch.DYNAMIC
        self._limits = Ceiling(ceiling if self._dynamic else None)
        self._usual_row_bytes = usual_row_bytes

    @property
    def safe_rows(self) -> int:
        """A run of as many rows or fewer meets no limit, however large its rows are."""
        return self._limits.lowest

    @property
    def ceiling(self) -> int | None:
        """The most rows of usual size that fit; None while every run has fitted."""
        rows = self.most_rows(self._usual_row_bytes)
        return None if rows == NO_LIMIT else rows

    def most_rows(self, row_bytes: int) -> int:
        """The most rows of `row_bytes` bytes each that may run at once."""
        return self._limits.rows(row_bytes)

    def run_in_parts(
        self, inputs: Sequence[Array], rows: int, run: Run
    ) -> tuple[list[Array], int, float]:
        """The outputs for all of `rows`, the rows that were run, padding included, and seconds.

        Raises `OutOfMemory` where not even the smallest run fits, and what `run` raises.
        """
        each = row_bytes(inputs, rows)
        parts: list[list[Array]] = []
        at, run_rows, compute_s = 0, 0, 0.0
        while at < rows:
            most = self.most_rows(each)
            size = min(most, rows - at)
            padded = self._rules.padded(size)
            padded = padded if padded <= most else size
            try:
                outputs, spent_s = run([a[at : at + size] for a in inputs], padded)
            except EXHAUSTED as error:
                self.learn(error, each, padded)
                continue
            parts.append(outputs)
            at, run_rows, compute_s = at + size, run_rows + padded, compute_s + spent_s
        return [np.concatenate(column) for column in zip(*parts, strict=True)], run_rows, compute_s

    def learn(self, error: Exception, row_bytes: int, padded: int) -> None:
        """Take note of a run of `padded` rows that did not fit.

        Raises `OutOfMemory` where there is no smaller one.
        """
        if padded == 1 or not self._dynamic:
            requested = error.requested_bytes if isinstance(error, MemoryExhausted) else None
            raise OutOfMemory(self._sentence(padded, requested))
        smaller = self._rules.smaller(padded)
        self._limits.lower(row_bytes, smaller)
        _log.warning(
            "a run of %d rows does not fit into the memory of %s: from now on runs have at most %d "
            "rows, where a row has %d bytes or more",
            padded,
            self._backend.device,
            smaller,
            row_bytes,
        )

    def _sentence(self, rows: int, requested_bytes: int | None) -> str:
        meter = self._backend.meter
        facts = ["1 row does" if rows == 1 else f"{rows} rows do"]
        facts.append(f"not fit into the memory of {self._backend.device}")
        if not self._dynamic:
            facts.append("and this model takes no fewer")
        if requested_bytes is not None:
            facts.append(f"({requested_bytes} bytes more were asked for)")
        if meter is not None and meter.limit_bytes is not None:
            facts.append(f"of which this replica may hold {meter.limit_bytes} bytes")
        remedy = "run the model where there is more"
        if meter is not None:
            remedy = "give the model more of a GPU (gpu_memory_bytes) or a smaller dtype"
        return f"{' '.join(facts)}: send smaller inputs, or {remedy}"


def row_bytes(inputs: Sequence[Array], rows: int) -> int:
    """Bytes of one row of all inputs together."""
    return sum(a.nbytes for a in inputs) // max(1, rows)
