"""Shadow traffic: requests that stable answered, sent to the canary too, and the answers compared.

A copy leaves after the client has its reply and waits behind every client's request. Where anything
is short (rows waiting at either arm, copies on their way, the memory that they hold) it is dropped.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from serving.core.batching import SHADOW_LEVEL
from serving.core.compare import METRICS, Comparison, Metric, comparison
from serving.core.inference import InferRequest, OutputTensor
from serving.core.routing import Split
from serving.errors import DeadlineExceeded, Overloaded, ServingError, Unavailable
from serving.gateway.infer import Call, Sink, monotonic
from serving.gateway.usage import NOBODY

if TYPE_CHECKING:
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.batcher import ArmBatcher

log = logging.getLogger(__name__)

MAX_WAITING_ROWS: Final = 32
MAX_COPIES: Final = 64
_MAX_HELD_BYTES: Final = 64 << 20
_TIMEOUT_S: Final = 10.0
# Beyond this a comparison takes milliseconds and is kept off the event loop.
_INLINE_BYTES: Final = 256 << 10

_Outputs = Sequence[OutputTensor]


class _Pairs:
    """What was compared in one epoch. `open`: copies of which nothing came yet."""

    __slots__ = ("disagreements", "dropped", "open", "pairs")

    def __init__(self) -> None:
        self.pairs = self.disagreements = self.dropped = self.open = 0


class Shadow:
    """One rollout's shadow traffic at this gateway."""

    def __init__(
        self,
        rollout: str,
        loop: asyncio.AbstractEventLoop,
        watch: Callable[[float], None],
    ) -> None:
        """`watch` is told of every new deadline."""
        self._rollout = rollout
        self._loop = loop
        self._watch = watch
        self._draw = random.Random().random
        self._pairs: dict[int, _Pairs] = {}
        self._settings: dict[str, Any] | None = None
        self._compare: Comparison | None = None
        self._inline = True
        # Nobody waits for a comparison: it must not keep others from the threads of the loop.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._copies = self._held = 0
        self._stopped = False

    def configure(self, split: Split, stable: ArmBatcher, canary: ArmBatcher) -> None:
        """Go by a new route table."""
        self.share = split.shadow
        self._stable, self._canary = stable, canary
        self._epoch = self._pairs.setdefault(split.epoch, _Pairs()) if self.share else _Pairs()
        settings = dict(split.compare)
        if self.share and settings != self._settings and not self._stopped:
            self._settings, self._compare = settings, None
            self._find_comparison(settings)

    def _find_comparison(self, settings: dict[str, Any]) -> None:
        """Until it is found, nothing is compared."""
        name = str(settings.get("metric", ""))
        if settings.get("kind") != "metric" or name in METRICS:
            self._inline = True
            self._found(settings, lambda: None)
            return
        # An operator's own function may take its time, and so may its module to load.
        self._inline = False
        loading = self._loop.run_in_executor(self._pool, load_metric, name)
        loading.add_done_callback(lambda done: self._found(settings, done.result))

    def _found(self, settings: dict[str, Any], metric: Callable[[], Metric | None]) -> None:
        if settings != self._settings or self._stopped:
            return
        try:
            self._compare = comparison(settings, self._stable.arm.signature, metric())
        except Exception as error:
            log.error("rollout %s: shadow traffic is dropped: %s", self._rollout, error)

    def stop(self) -> None:
        """Send no more, and count what is on its way as dropped."""
        self._stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for call in self._canary.outstanding():
            if call.level == SHADOW_LEVEL:
                self._canary.forget(call)
                call.fail(Unavailable("this gateway is shutting down"))

    def sample(self, call: Call) -> None:
        """Choose whether a request of stable's is to be copied once it is answered."""
        if self._draw() < self.share:
            call.sink = _Sampled(call.sink, self)

    def offer(self, request: InferRequest, answer: BatchAnswer, position: int) -> None:
        """Copy a request that stable has answered, if there is room for it.

        Raises nothing: its client has the answer, so whatever fails is no failure of stable's.
        """
        try:
            copied = self._has_room() and self._offer(request, answer, position)
        except Exception:
            log.exception("rollout %s: a request could not be copied", self._rollout)
            copied = False
        if not copied:
            self._epoch.dropped += 1

    def _offer(self, request: InferRequest, answer: BatchAnswer, position: int) -> bool:
        """Copy a request, unless all copies would hold too much then; whether it is copied."""
        outputs = _copy(answer.outputs(position))
        held = sum(map(len, request.inputs)) + _nbytes(outputs)
        if self._held + held > _MAX_HELD_BYTES:
            return False
        copy = _Copy(self, self._epoch, outputs, held)
        self._loop.call_soon(self._send, request, copy)
        self._copies += 1
        self._held += held
        self._epoch.open += 1
        return True

    def _has_room(self) -> bool:
        return (
            self._compare is not None
            and not self._stopped
            and self._canary.ready
            and self._copies < MAX_COPIES
            and self._stable.queue_depth <= MAX_WAITING_ROWS
            and self._canary.queue_depth <= MAX_WAITING_ROWS
        )

    def _send(self, request: InferRequest, sink: _Copy) -> None:
        now = monotonic()
        canary = self._canary
        deadline = now + min(_TIMEOUT_S, canary.arm.timeout_s)
        call = Call(canary, request, sink, now, deadline, SHADOW_LEVEL, NOBODY)
        call.unseen = True
        if self._stopped or canary.closed or not canary.ready or not canary.has_room(call):
            sink.drop()
            return
        canary.admit(call)
        self._watch(deadline)

    def compare(self, copy: _Copy, outputs: _Outputs) -> None:
        """Compare the canary's answer, valid now, with stable's."""
        agree = self._compare
        if agree is None or self._stopped:
            copy.drop()
        elif self._inline and _nbytes(outputs) + _nbytes(copy.outputs) <= _INLINE_BYTES:
            self._judge(copy, lambda: agree(copy.outputs, outputs))
        else:
            kept = _copy(outputs)
            work = self._loop.run_in_executor(self._pool, agree, copy.outputs, kept)
            work.add_done_callback(
                lambda done: copy.drop() if done.cancelled() else self._judge(copy, done.result)
            )

    def _judge(self, copy: _Copy, agreed: Callable[[], bool]) -> None:
        try:
            copy.count(agreed())
        except Exception as error:
            # The metric's fault, and neither version's.
            log.error("rollout %s: a comparison failed: %r", self._rollout, error)
            copy.drop()

    def gone(self, copy: _Copy) -> None:
        """A copy holds nothing any more."""
        self._copies -= 1
        self._held -= copy.held

    @property
    def open(self) -> set[int]:
        """Epochs with copies of which nothing came yet."""
        return {epoch for epoch, pairs in self._pairs.items() if pairs.open}

    def forget(self, epochs: Iterable[int]) -> None:
        """Tell no more of epochs that are over."""
        for epoch in epochs:
            self._pairs.pop(epoch, None)

    def report(self) -> Iterator[dict[str, Any]]:
        """A row an epoch."""
        for epoch, pairs in self._pairs.items():
            yield {
                "rollout": self._rollout,
                "epoch": epoch,
                "pairs": pairs.pairs,
                "disagreements": pairs.disagreements,
                "dropped": pairs.dropped,
            }


class _Sampled:
    """The sink of a request that is to be copied: the client's, and then the copy."""

    __slots__ = ("_shadow", "_sink", "failed", "given_id", "header", "moved", "reply_id")

    def __init__(self, sink: Sink, shadow: Shadow) -> None:
        self._sink = sink
        self._shadow = shadow
        self.failed, self.moved = sink.failed, sink.moved
        self.header, self.reply_id = sink.header, sink.reply_id
        self.given_id = sink.given_id

    def answered(self, call: Call, answer: BatchAnswer, position: int) -> float:
        finished = self._sink.answered(call, answer, position)
        self._shadow.offer(call.request, answer, position)
        return finished


class _Copy:
    """The sink of a copy: it holds what stable answered. Counts once what came of it."""

    __slots__ = ("_pairs", "_shadow", "held", "outputs")
    given_id: Final[bytes | None] = None

    def __init__(self, shadow: Shadow, pairs: _Pairs, outputs: _Outputs, held: int) -> None:
        self._shadow = shadow
        self._pairs = pairs
        self.outputs = outputs
        self.held = held

    def answered(self, call: Call, answer: BatchAnswer, position: int) -> float:
        self._shadow.compare(self, answer.outputs(position))
        return monotonic()

    def failed(self, call: Call, error: ServingError) -> None:
        if isinstance(error, Overloaded | Unavailable | DeadlineExceeded) or not _first(call):
            self.drop()
        else:
            self.count(False)

    def moved(self, call: Call) -> None:
        pass

    def header(self, name: bytes) -> bytes | None:
        return None

    def reply_id(self) -> bytes:
        return b""

    def count(self, agreed: bool) -> None:
        self._pairs.pairs += 1
        self._pairs.disagreements += not agreed
        self._gone()

    def drop(self) -> None:
        self._pairs.dropped += 1
        self._gone()

    def _gone(self) -> None:
        self._pairs.open -= 1
        self._shadow.gone(self)


def _first(call: Call) -> bool:
    """Whether a copy is the first to tell of its batch's failure."""
    return call.cluster is None or call.cluster.first(_Copy)


def _copy(outputs: _Outputs) -> list[OutputTensor]:
    return [OutputTensor(o.index, o.shape, bytes(o.data)) for o in outputs]


def _nbytes(outputs: _Outputs) -> int:
    return sum(len(o.data) for o in outputs)


def load_metric(name: str) -> Metric:
    """The function that "module:function" names.

    Raises ImportError, AttributeError, or ValueError for a name of another form.
    """
    module, separator, function = name.partition(":")
    if not (module and separator and function):
        raise ValueError(f"metric is {name!r}; allowed: {', '.join(METRICS)}, or module:function")
    found: Metric = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise ValueError(f"metric {name!r} is no function")
    return found
