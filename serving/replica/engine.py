"""Runs batches on one backend: merge what waits, pad, run, check, split.

Any number of threads call `submit`; one of them at a time leads. A leader takes its own batch and
every compatible one that waits (same shapes behind the rows, together at most `max_size` rows),
runs them as one, hands out the results and names the next leader. With nobody waiting there is no
hand-over at all: the thread that read a batch from its socket runs the model. A merged run that
fails is repeated part by part, so that only the guilty part fails. A run that does not fit into
memory is repeated in runs of fewer rows, and no later run has as many.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from serving.core.types import Batch
from serving.errors import DeadlineExceeded, InvalidRequest, ModelFailed, ServingError
from serving.replica.backends.base import Array, Backend, one_line
from serving.replica.backends.faults import FatalDeviceError
from serving.replica.memory_fit import EXHAUSTED, MemoryFit, row_bytes
from serving.replica.outputs import OutputCheck
from serving.replica.rules import BatchRules
from serving.replica.work import Work

_log = logging.getLogger(__name__)

_LOG_PERIOD_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """How long the device was busy with traffic, in nanoseconds.

    `answered_ns` is what results told of their runs, less `padding_ns`, the share of rows that
    nobody asked for. `failed_ns` is runs without a result, and those that did not fit into memory.
    """

    answered_ns: int
    padding_ns: int
    failed_ns: int


class Engine:
    """One backend and the batches that wait for it.

    `ceiling` is the most rows a run that is known to fit into memory, if anything is known;
    `usual_row_bytes` the size of a usual row of input.
    `on_fatal` is called where the device is of no more use to this process, and ends it; without it
    `submit` raises `FatalDeviceError`.
    """

    def __init__(
        self,
        backend: Backend,
        rules: BatchRules,
        *,
        ceiling: int | None = None,
        usual_row_bytes: int = sys.maxsize,
    ) -> None:
        self.backend = backend
        self.rules = rules
        self.on_fatal: Callable[[FatalDeviceError], None] | None = None
        self.oom_batches = 0
        self._memory = MemoryFit(backend, rules, ceiling, usual_row_bytes)
        self._safe_rows = self._memory.safe_rows
        self._ran_out_at = 0.0
        self._answered_ns = self._padding_ns = self._failed_ns = 0
        self._merges = backend.signature.batch is not Batch.NONE
        self._merge_size = rules.merge_size
        self._outputs = OutputCheck(backend.signature)
        self._n_inputs = len(backend.signature.inputs)
        self._mutex = threading.Lock()
        self._waiting: deque[Work] = deque()
        self._busy = False
        self._run_started = 0.0
        self._last_end = time.monotonic()
        self._last_logged = -_LOG_PERIOD_S

    def submit(self, work: Work) -> None:
        """Run `work`, alone or with others; return when it is finished, `work.error` set or not."""
        if self._refused(work):
            return
        with self._mutex:
            if self._busy:
                work.shapes = _shapes(work, self._merges)
                work.wake = threading.Lock()
                work.wake.acquire()
                self._waiting.append(work)
            else:
                self._busy = True
        if work.wake is not None:
            work.wake.acquire()
            if work.finished:
                return
        self._lead(work)

    @property
    def waiting(self) -> int:
        """How many batches wait for the run in progress to end."""
        return len(self._waiting)

    @property
    def stalled_s(self) -> float:
        """How long the current run has lasted, in seconds; 0 when idle."""
        started = self._run_started
        return time.monotonic() - started if started else 0.0

    @property
    def ceiling(self) -> int | None:
        """The most rows of usual size that fit into memory; None while every run has fitted."""
        return self._memory.ceiling

    @property
    def usage(self) -> Usage:
        """What the device did since `warmed_up`."""
        return Usage(self._answered_ns, self._padding_ns, self._failed_ns)

    def warmed_up(self) -> None:
        """From here on it is traffic: what was used, and what ran out, before it counts no more."""
        self._answered_ns = self._padding_ns = self._failed_ns = 0
        self.oom_batches = 0

    @property
    def idle_s(self) -> float:
        """How long no batch has been in flight, in seconds."""
        return 0.0 if self._busy else time.monotonic() - self._last_end

    def _refused(self, work: Work) -> bool:
        if work.rows <= self.rules.max_size:
            return False
        work.error = InvalidRequest(
            f"a batch of {work.rows} rows; this model takes at most {self.rules.max_size}"
        )
        work.finished = True
        return True

    def _lead(self, work: Work) -> None:
        """Run `work` with what may join it, then pass the lead on."""
        group = [work]
        try:
            if self._waiting:
                self._gather(group)
            self._run_group(group)
        finally:
            self._last_end = time.monotonic()
            with self._mutex:
                heir = self._waiting.popleft() if self._waiting else None
                self._busy = heir is not None
            # The next run starts before these results are sent: sending overlaps with it.
            if heir is not None and heir.wake is not None:
                heir.wake.release()
            for mate in group:
                if mate.error is None and not mate.outputs:
                    mate.error = ModelFailed("the run was abandoned")
                mate.finished = True
                if mate is not work and mate.wake is not None:
                    mate.wake.release()

    def _gather(self, group: list[Work]) -> None:
        """Move every waiting batch that can run with `group[0]` into `group`."""
        if not self._merges or group[0].alone:
            return
        room = self._merge_size - group[0].rows
        if self._safe_rows < self._merge_size:
            most = self._memory.most_rows(row_bytes(group[0].inputs, group[0].rows))
            room = min(room, most - group[0].rows)
        shapes = group[0].shapes or _shapes(group[0], self._merges)
        moment = time.monotonic()
        with self._mutex:
            kept: deque[Work] = deque()
            for waiting in self._waiting:
                if waiting.deadline and waiting.deadline <= moment:
                    group.append(waiting)  # takes no room: it will be told, not run
                elif not waiting.alone and waiting.rows <= room and waiting.shapes == shapes:
                    group.append(waiting)
                    room -= waiting.rows
                else:
                    kept.append(waiting)
            self._waiting = kept

    def _run_group(self, group: list[Work]) -> None:
        started = time.monotonic()
        alive = []
        for work in group:
            work.queue_s = started - work.arrived
            if work.deadline and started >= work.deadline:
                work.error = DeadlineExceeded(
                    f"the deadline passed {(started - work.deadline) * 1e3:.1f} ms before the run"
                )
            else:
                alive.append(work)
        if not alive:
            return
        try:
            self._run(alive)
        except FatalDeviceError as error:
            if self.on_fatal is not None:
                self.on_fatal(error)
            raise
        except ServingError as error:
            self._failed(alive, error)
        except Exception as error:
            self._log_failure(alive)
            self._failed(alive, ModelFailed(f"the model failed: {one_line(error)}"))

    def _log_failure(self, group: list[Work]) -> None:
        """Log the exception in progress, but not each of a stream of them."""
        if time.monotonic() - self._last_logged >= _LOG_PERIOD_S:
            self._last_logged = time.monotonic()
            _log.warning("the model failed on %d rows", sum(w.rows for w in group), exc_info=True)

    def _failed(self, group: list[Work], error: ServingError) -> None:
        if len(group) == 1:
            group[0].error = error
            return
        for work in group:
            self._run_group([work])

    def _run(self, group: list[Work]) -> None:
        """One run over all of `group`, or several where memory asks for it.

        Raises what the backend raises, `ModelFailed`, and `OutOfMemory`.
        """
        rows = sum([w.rows for w in group])
        padded = self.rules.padded(rows) if self._merges else rows
        if padded > self._safe_rows:
            self._run_in_parts(group, rows)
            return
        as_it_came = len(group) == 1 and padded == rows
        outputs = None
        self._run_started = started = time.monotonic()
        try:
            if as_it_came:
                inputs = group[0].inputs
            else:
                inputs = [
                    _merge([w.inputs[i] for w in group], padded) for i in range(self._n_inputs)
                ]
            outputs = self._outputs.checked(self.backend.run(inputs), padded)
        except EXHAUSTED as error:
            self._count_exhausted()
            self._memory.learn(error, row_bytes(group[0].inputs, group[0].rows), padded)
        finally:
            self._run_started = 0.0
            compute_s = time.monotonic() - started
            if outputs is None:
                self._failed_ns += int(compute_s * 1e9)
        if outputs is None:
            self._run_in_parts(group, rows)
            return
        self._count_answered(group, compute_s, rows, padded)
        at = 0
        for work in group:
            end = at + work.rows
            work.outputs = outputs if as_it_came else [out[at:end] for out in outputs]
            work.run_rows, work.compute_s, at = padded, compute_s, end

    def _run_in_parts(self, group: list[Work], rows: int) -> None:
        """As many runs over the rows of `group` as it takes for each to fit into memory."""
        inputs = group[0].inputs
        if len(group) > 1:
            inputs = [_merge([w.inputs[i] for w in group], rows) for i in range(self._n_inputs)]
        compute_s, started = 0.0, time.monotonic()
        try:
            outputs, run_rows, compute_s = self._memory.run_in_parts(inputs, rows, self._run_part)
        finally:
            self._safe_rows = self._memory.safe_rows
            self._failed_ns += int((time.monotonic() - started - compute_s) * 1e9)
        self._count_answered(group, compute_s, rows, run_rows)
        at = 0
        for work in group:
            end = at + work.rows
            work.outputs = [out[at:end] for out in outputs]
            work.run_rows, work.compute_s, at = run_rows, compute_s, end

    def _run_part(self, inputs: list[Array], padded: int) -> tuple[list[Array], float]:
        """The outputs of one run padded to `padded` rows, and the seconds that it took."""
        rows = len(inputs[0])
        self._run_started = started = time.monotonic()
        try:
            if padded > rows:
                inputs = [_merge([a], padded) for a in inputs]
            outputs = self._outputs.checked(self.backend.run(inputs), padded)
        except EXHAUSTED:
            self._count_exhausted()
            raise
        finally:
            self._run_started = 0.0
        return [out[:rows] for out in outputs], time.monotonic() - started

    def _count_answered(self, group: list[Work], compute_s: float, rows: int, padded: int) -> None:
        """Count a run as gateways do, who are told whole microseconds: theirs must add up to it."""
        ns = int(compute_s * 1e6) * 1000
        for work in group:
            self._answered_ns += ns * work.rows // padded
        if padded > rows:
            self._padding_ns += ns * (padded - rows) // padded

    def _count_exhausted(self) -> None:
        """Count what was led as one, once, however many of its runs do not fit."""
        if self._ran_out_at != self._last_end:
            self._ran_out_at = self._last_end
            self.oom_batches += 1


def _shapes(work: Work, has_rows: bool) -> tuple[tuple[int, ...], ...]:
    return tuple(a.shape[1:] if has_rows else a.shape for a in work.inputs)


def _merge(parts: Sequence[Array], rows: int) -> Array:
    """`parts` one under the other, padded to `rows` rows.

    Padding repeats the last row: a value that the model accepts, where zeros might not be (a log,
    an index).
    """
    merged = np.empty((rows, *parts[0].shape[1:]), parts[0].dtype)
    at = 0
    for part in parts:
        merged[at : at + len(part)] = part
        at += len(part)
    if 0 < at < rows:
        merged[at:] = merged[at - 1]
    return merged
