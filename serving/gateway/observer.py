"""What a rollout's arms predict: counted for drift, and kept for the labels that come later."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zlib import crc32

import numpy as np

from serving.core.predictions import PredictionReader, is_class
from serving.core.routing import Split
from serving.core.types import Signature
from serving.gateway.infer import monotonic

if TYPE_CHECKING:
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.infer import Call
    from serving.gateway.trials import Trial

log = logging.getLogger(__name__)

_MAX_ENTRIES: Final = 200_000


class Observer:
    """Reads the predictions of batches of a rollout's requests."""

    def __init__(self, split: Split, signature: Signature, memory: Memory | None) -> None:
        """Raises ValueError where the model has no output to observe."""
        self._reader = PredictionReader(signature, split.feedback.get("output"))
        self._count = split.observe
        self._memory = memory

    def note(
        self,
        trial: Trial,
        replica: str,
        batch: Sequence[Call],
        positions: Sequence[int],
        answer: BatchAnswer,
    ) -> None:
        """Take in a run, of which the requests at `positions` were answered."""
        shape, data = answer.output(self._reader.index)
        codes = self._reader.read(shape, data)
        ends = list(accumulate(call.rows for call in batch))
        if len(codes) != ends[-1]:
            # A model without batch dimension gives one prediction for however many rows.
            ends = list(range(1, len(batch) + 1))
        spans = [(ends[i - 1] if i else 0, ends[i]) for i in positions]
        if self._count:
            some = len(positions) < len(batch)
            answered = np.concatenate([codes[a:b] for a, b in spans]) if some else codes
            trial.tally(replica).predictions.extend(answered)
        if self._memory is not None:
            kept = codes.tolist()
            for position, (start, end) in zip(positions, spans, strict=True):
                call = batch[position]
                if not call.unseen:
                    self._memory.keep(call.sink.reply_id(), trial, replica, kept[start:end])


class _Entry(NamedTuple):
    """An answer that may get a label: when it was, where it counts, what was predicted."""

    at: float
    trial: Trial
    replica: str
    codes: list[int]


class Memory:
    """The answers of the last while by request id. An id that comes again replaces its first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._joined: set[bytes] = set()
        self.configure({})

    def configure(self, feedback: Mapping[str, Any]) -> None:
        """Keep answers for `window_s`, and at most `max_entries` of them."""
        self._window = float(feedback.get("window_s", 0.0))
        self._most = int(feedback.get("max_entries", _MAX_ENTRIES))

    def keep(self, request_id: bytes, trial: Trial, replica: str, codes: list[int]) -> None:
        """Remember what a request was answered."""
        now = monotonic()
        self.drop(request_id)
        self._entries[request_id] = _Entry(now, trial, replica, codes)
        self._forget(now)

    def drop(self, request_id: bytes) -> None:
        """Forget a request."""
        if self._entries.pop(request_id, None) is not None:
            self._joined.discard(request_id)

    def _forget(self, now: float) -> None:
        entries = self._entries
        while entries:
            oldest = next(iter(entries))
            if len(entries) <= self._most and entries[oldest].at + self._window >= now:
                return
            self.drop(oldest)

    def join(self, request_id: bytes, label: object) -> bool:
        """Count a label in the trial that served its request; whether the request is known.

        A request counts once, however often its label comes. Of several rows one is judged, chosen
        by the request's id: rows of one request are no independent evidence.
        """
        self._forget(monotonic())
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if request_id in self._joined:
            return True
        labels = label if isinstance(label, list) else [label]
        row = crc32(request_id) % max(1, len(entry.codes))
        fits = len(labels) == len(entry.codes) and is_class(entry.codes[row])
        wanted = _class(labels[row]) if fits else None
        if wanted is None:
            log.warning(
                "the label of request %s is left out: expected %d classes, as integers",
                request_id.decode("latin-1"),
                len(entry.codes),
            )
            return True
        self._joined.add(request_id)
        entry.trial.label(entry.replica, wrong=wanted != entry.codes[row])
        return True


def _class(label: object) -> int | None:
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, str):
        try:
            return int(label)
        except ValueError:
            return None
    return label if isinstance(label, int) else None
