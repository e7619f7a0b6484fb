"""What a rollout's arms predict: counted for drift, and kept for the labels that come later."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from zlib import crc32

import numpy as np

from serving.core.predictions import PredictionReader, is_class
from serving.core.rollout_spec import Feedback
from serving.core.routing import Split
from serving.core.types import Signature
from serving.gateway.infer import monotonic

if TYPE_CHECKING:
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.infer import Call
    from serving.gateway.trials import Trial

log = logging.getLogger(__name__)

_MAX_ENTRIES: Final = Feedback().max_entries


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
        if self._memory is None and len(positions) == len(batch):
            # All of them are counted, so whose is which does not matter.
            predictions = trial.tally(replica).predictions
            if self._reader.batched:
                predictions.read_later(self._reader, shape, data)
            else:
                predictions.extend(self._reader.read(shape, data))
            return
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
            known = [
                (batch[position].sink.reply_id(), kept[start:end])
                for position, (start, end) in zip(positions, spans, strict=True)
                if not batch[position].unseen
            ]
            self._memory.keep(_Origin(monotonic(), trial, replica), known)


class _Origin(NamedTuple):
    """Where answers came from, and when."""

    at: float
    trial: Trial
    replica: str


class Memory:
    """The answers of the last while by request id. An id that comes again replaces its first."""

    def __init__(self) -> None:
        # With what was predicted, a code a row; the oldest first.
        self._entries: OrderedDict[bytes, tuple[_Origin, list[int]]] = OrderedDict()
        self._joined: set[bytes] = set()
        # How many were forgotten, being too many, before their time was over.
        self.forgotten = 0
        self.configure({})

    def configure(self, feedback: Mapping[str, Any]) -> None:
        """Keep answers for `window_s`, and at most `max_entries` of them."""
        self.window_s = float(feedback.get("window_s", 0.0))
        self._most = int(feedback.get("max_entries", _MAX_ENTRIES))

    def keep(self, origin: _Origin, answered: Iterable[tuple[bytes, list[int]]]) -> None:
        """Remember what requests were answered."""
        entries = self._entries
        for request_id, codes in answered:
            if request_id in entries:
                self._drop(request_id)
            entries[request_id] = (origin, codes)
        self._forget(origin.at)

    def _drop(self, request_id: bytes) -> None:
        del self._entries[request_id]
        self._joined.discard(request_id)

    def _forget(self, now: float) -> None:
        entries = self._entries
        while entries:
            oldest = next(iter(entries))
            if entries[oldest][0].at + self.window_s >= now:
                if len(entries) <= self._most:
                    return
                self.forgotten += 1
            self._drop(oldest)

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
        origin, codes = entry
        labels = label if isinstance(label, list) else [label]
        row = crc32(request_id) % max(1, len(codes))
        fits = 0 < len(labels) == len(codes) and is_class(codes[row])
        wanted = _class(labels[row]) if fits else None
        if wanted is None:
            log.warning(
                "the label of request %s is left out: expected %d classes, as integers",
                request_id.decode("latin-1"),
                len(codes),
            )
            return True
        self._joined.add(request_id)
        origin.trial.label(origin.replica, wrong=wanted != codes[row])
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
