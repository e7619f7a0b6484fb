"""The load of arms over the last few seconds, from what gateways and replicas report."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from serving.control.fleet import Replica
from serving.control.totals import ArmTotals, Histogram
from serving.core.ledger_leases import ReplicaUsage
from serving.core.scaling import WINDOW_S
from serving.errors import (
    BudgetSpent,
    Forbidden,
    HeadersTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    Unauthenticated,
    Unavailable,
    Unsupported,
    UnsupportedEncoding,
)

QUANTILE: Final = 0.95
"""Of queue delays: so many requests wait no longer."""
_REFUSED: Final = (Overloaded.slug, Unavailable.slug)
_NOT_ADMITTED: Final = frozenset(
    error.slug
    for error in (
        BudgetSpent,
        Forbidden,
        HeadersTooLarge,
        InvalidRequest,
        MethodNotAllowed,
        NotFound,
        PayloadTooLarge,
        RequestTimeout,
        Unauthenticated,
        Unsupported,
        UnsupportedEncoding,
    )
)
"""Outcomes that are the client's fault: no replica, however many there were, would have helped."""


class _Counted(NamedTuple):
    """An arm's totals at a time; `queue` are the counts of its queue delays by bucket.

    `requests` are those that a replica could have answered.
    """

    at: float
    requests: int
    refused: int
    queue: tuple[int, ...]
    bounds: tuple[float, ...]


class _Used(NamedTuple):
    """A replica's totals as it announced them, in nanoseconds."""

    at: float
    up_ns: int
    busy_ns: int


@dataclass
class Load:
    """One arm's load. `note` it, then ask. Times are monotonic seconds."""

    _counted: deque[_Counted] = field(default_factory=deque)
    _used: dict[str, deque[_Used]] = field(default_factory=dict)
    _waiting: int = 0

    def note(self, now: float, totals: ArmTotals, replicas: Iterable[Replica]) -> None:
        """Take in the arm's totals and the last announcements of its replicas."""
        queue = totals.histograms.get("queue") or Histogram.empty(())
        refused = sum(totals.requests.get(outcome, 0) for outcome in _REFUSED)
        requests = sum(n for outcome, n in totals.requests.items() if outcome not in _NOT_ADMITTED)
        counted = _Counted(now, requests, refused, tuple(queue.counts), queue.bounds)
        if self._counted and (self._counted[-1].bounds != counted.bounds or _fell(self, counted)):
            self._counted.clear()
        self._counted.append(counted)
        _shorten(self._counted, now)
        self._waiting = totals.waiting
        ready = {r.endpoint.replica: r for r in replicas if r.state == "ready" and _tells(r)}
        if ready.keys() != self._used.keys():
            # What each did before it shared the work with these adds up to more than there was.
            self._used = {name: deque() for name in ready}
        for name, replica in ready.items():
            _note_usage(self._used[name], replica)

    @property
    def rate(self) -> float:
        """Requests a second that a replica could have answered, refused ones too."""
        first, last = self._counted[0], self._counted[-1]
        return (
            (last.requests - first.requests) / (last.at - first.at) if last.at > first.at else 0.0
        )

    @property
    def busy(self) -> float | None:
        """Run time of all replicas over the time that passed.

        None until each has said it twice since the last of them came or went.
        """
        spans = [(u[0], u[-1]) for u in self._used.values() if len(u) > 1]
        if not spans or len(spans) < len(self._used):
            return None
        return sum((b.busy_ns - a.busy_ns) / (b.up_ns - a.up_ns) for a, b in spans)

    def queue_delay_s(self, refused_s: float) -> float | None:
        """How long nearly all wait: measured of who was answered, estimated of who waits.

        A request that was refused would have waited `refused_s` or more. None: nobody came.
        """
        first, last = self._counted[0], self._counted[-1]
        delays = []
        counts = [b - a for a, b in zip(first.queue, last.queue, strict=True)]
        answered = sum(counts)
        if answered:
            delays.append(Histogram(last.bounds, counts).quantile(QUANTILE) or 0.0)
        if self._waiting:
            # By Little's law; where nothing is answered at all it takes at least this long.
            span = last.at - first.at
            delays.append(self._waiting * span / answered if answered else WINDOW_S)
        if last.refused > first.refused:
            delays.append(refused_s)
        return max(delays, default=None)


def _fell(load: Load, counted: _Counted) -> bool:
    """Whether totals went backwards: a gateway's last report was lost with the controller."""
    return counted.requests < load._counted[-1].requests


def _shorten(samples: deque[_Counted], now: float) -> None:
    """Keep the window, and the sample that it begins with."""
    while len(samples) > 2 and samples[1].at <= now - WINDOW_S:
        samples.popleft()


def _note_usage(samples: deque[_Used], replica: Replica) -> None:
    usage = ReplicaUsage.from_dict(replica.info["usage"])
    busy_ns = usage.answered_ns + usage.padding_ns + usage.failed_ns
    used = _Used(replica.heard_at, usage.up_ns, busy_ns)
    if samples and used.up_ns <= samples[-1].up_ns:
        if used.up_ns == samples[-1].up_ns:
            return
        samples.clear()  # another life of the same name
    samples.append(used)
    while len(samples) > 2 and samples[1].at <= used.at - WINDOW_S:
        samples.popleft()


def _tells(replica: Replica) -> bool:
    usage = replica.info.get("usage")
    return isinstance(usage, Mapping)
