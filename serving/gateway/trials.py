"""What a rollout learns at this gateway: counts an arm, an epoch and a replica.

Totals since the gateway's start, as all that it reports, so a lost report loses nothing. An epoch
has one weight; a request belongs to the epoch in which it was assigned, however late its answer.

A trial counts each way the evidence needs: requests and failed requests, batches and failed
batches. What a client did wrong is in neither, if that is known: without a shield nobody says whose
fault an input is that a model refuses, so it counts in both arms while they are compared. What a
client gave up is in neither, but if it waited for longer than the epoch's latency bound its answer
is known to be slow.

Where units stick to their arm, users say, a request is a unit: its first answer counts, and its
first failure, by batch too. Latency is that of every request and every run. A batch is a run, or a
draw where that is more: requests that were drawn together are one event, however many runs they
come to, and a run is one, however many draws it is of. So each batch, and each that failed, stands
for a run of its own and for a draw of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from serving.errors import InvalidRequest, Overloaded, ServingError
from serving.gateway.tally import Tally

if TYPE_CHECKING:
    from serving.gateway.answers import BatchAnswer
    from serving.gateway.infer import Call
    from serving.gateway.observer import Observer
    from serving.gateway.splitter import Splitter

STABLE: Final = "stable"
CANARY: Final = "canary"


class Counted:
    """A batch that was counted, in one replica's tally; it fails at most once."""

    __slots__ = ("failed", "tally")

    def __init__(self, tally: Tally) -> None:
        tally.batches += 1
        self.tally = tally
        self.failed = False

    def fail(self) -> bool:
        """Count it as failed, unless it has been; whether it was now."""
        if self.failed:
            return False
        self.failed = True
        self.tally.failed_batches += 1
        return True


class Draw:
    """Requests that chance sent to an arm together; `batch` is what they were counted as.

    `given_up`: whether the latency of the batch is that of one whose client left.
    """

    __slots__ = ("batch", "given_up")

    def __init__(self) -> None:
        self.batch: Counted | None = None
        self.given_up = False


class Unit(Draw):
    """What sticks to an arm: all its requests in an epoch are one draw, and count as one.

    `point`: where it lies in [0, 1). `counted`: the replica that it counts for, if it does.
    `failed`: whether the arm has failed it.
    """

    __slots__ = ("counted", "failed", "point")

    def __init__(self, point: float) -> None:
        super().__init__()
        self.point = point
        self.counted: Tally | None = None
        self.failed = False

    def fails(self, tally: Tally) -> bool:
        """Whether it fails for the first time; then it counts for the replica that failed it."""
        if self.failed:
            return False
        self.failed = True
        if self.counted is not tally:
            if self.counted is not None:
                self.counted.requests -= 1
                self.batch = None
            self.counted = tally
            tally.requests += 1
        return True


class Cluster:
    """Requests of one fate: their run failed, their replica was lost, or they waited behind it.

    Whatever comes of each, a trial counts them as one batch, and as one that failed if any did.
    """

    __slots__ = ("_batches", "_failed")

    def __init__(self) -> None:
        # By trial: its failure goes to the replica where it was counted.
        self._batches: dict[Trial, Counted] = {}
        self._failed: set[object] = set()

    def count(self, trial: Trial, tally: Tally) -> Counted | None:
        """Count the batch; None if it has been counted before."""
        if trial in self._batches:
            return None
        batch = self._batches[trial] = Counted(tally)
        return batch

    def count_failure(self, trial: Trial, tally: Tally, draw: Draw | None) -> bool:
        """Count the batch as failed, unless it has been, or the draw has; whether it was now."""
        batch = self._batches.get(trial)
        own = None if draw is None else draw.batch
        if own is not None and own.failed and own is not batch:
            return False
        if batch is None:
            # What another run has answered of the draw is the same batch.
            batch = self._batches[trial] = own or Counted(tally)
        if draw is not None:
            draw.batch = batch
        return batch.fail()

    def first(self, who: object) -> bool:
        """Whether `who` hears of the failure for the first time."""
        if who in self._failed:
            return False
        self._failed.add(who)
        return True


def together(calls: Sequence[Call]) -> None:
    """Note that these requests have one fate, one that some of them shared before perhaps."""
    cluster = next((call.cluster for call in calls if call.cluster is not None), None) or Cluster()
    for call in calls:
        if call.cluster is None:
            call.cluster = cluster


def blame(
    late: Sequence[Call], running: Sequence[list[Call]], waiting: Sequence[Call], replica: str
) -> None:
    """Note what requests that are late share, and the replica that they had.

    `running` are their version's batches at replicas, `waiting` its requests that wait. Those of
    the late that wait, wait for what runs: they are late with the batch that runs longest. Where
    nothing runs they share the lack of a replica, which counts for `replica`.
    """
    in_batches = {call for call in late if call.sent}
    for batch in running:
        if not in_batches.isdisjoint(batch):
            together(batch)
    waited = [call for call in late if not call.sent]
    if not waited:
        return
    longest = min(running, key=lambda batch: batch[0].sent, default=[])
    together([*(longest or waiting), *waited])
    for call in waited:
        call.replica = call.replica or (longest[0].replica if longest else replica)


def _count_units(tally: Tally, answered: Sequence[Call]) -> tuple[Call, int]:
    """How many of a run's answers count, of a unit the first, and which of them tells of the batch.

    That is the last, but rather one that no unit stands for: its draw has yet to be counted.
    """
    last, of_draw, count = answered[-1], None, 0
    for call in answered:
        unit = call.draw
        if not isinstance(unit, Unit):
            of_draw = call
        elif unit.counted is None:
            unit.counted = tally
            last = call
        else:
            continue
        count += 1
    return of_draw or last, count


class Trial:
    """One arm in one epoch."""

    __slots__ = (
        "arm",
        "epoch",
        "latency_bound_s",
        "observer",
        "rollout",
        "splitter",
        "tallies",
    )

    def __init__(self, splitter: Splitter, rollout: str, epoch: int, arm: str) -> None:
        self.splitter = splitter
        self.rollout = rollout
        self.epoch = epoch
        self.arm = arm
        self.observer: Observer | None = None
        self.latency_bound_s = math.inf
        self.tallies: dict[str, Tally] = {}

    def tally(self, replica: str) -> Tally:
        """The counts of one replica."""
        tally = self.tallies.get(replica)
        if tally is None:
            tally = self.tallies[replica] = Tally()
        return tally

    def batch_answered(
        self,
        replica: str,
        batch: Sequence[Call],
        positions: Sequence[int],
        latencies: list[float],
        answer: BatchAnswer,
    ) -> None:
        """Count the answers to a run's requests at `positions`, which took so many seconds."""
        tally = self.tally(replica)
        tally.latency.extend(latencies)
        # By requests: a run of several trials is rare, and who is in which has nothing to do with
        # how many rows it has.
        tally.busy_ns += answer.busy_ns * len(latencies) // len(batch)
        last, new = batch[positions[-1]], len(latencies)
        if self.splitter.sticks:
            last, new = _count_units(tally, [batch[position] for position in positions])
        tally.requests += new
        # A run of units that are known has its latency all the same.
        if self._count_batch(tally, last) if new else last.cluster is None:
            tally.batch_latency.extend([max(latencies)])
        if self.arm == CANARY:
            self.splitter.breaker.succeeded(last.sent)
        if self.observer is not None:
            self.observer.note(self, replica, batch, positions, answer)

    def _count_batch(self, tally: Tally, last: Call) -> bool:
        """Count a run, of which `last` is this trial's last request; whether its latency counts.

        Requests leave in the order of arrival, so if a run has any of a draw that no other run has
        counted, it ends with one.
        """
        draw, cluster = last.draw, last.cluster
        if draw is not None and draw.batch is not None:
            return False
        batch = Counted(tally) if cluster is None else cluster.count(self, tally)
        if draw is not None and (cluster is None or draw.__class__ is not Unit):
            # What others of a cluster make of its batch is not on a unit's account.
            draw.batch = batch
        if cluster is not None and not cluster.first(tally.batch_latency):
            return False
        return batch is not None and (draw is None or not draw.given_up)

    def given_up(self, call: Call, seconds: float) -> None:
        """A client left after so long: where that is too long, its answer is a slow one.

        As if it had been answered then: of a run, and of what was drawn together, one counts.
        """
        if seconds <= self.latency_bound_s:
            return
        call.arm.blame([call])
        tally, draw = self.tally(call.replica), call.draw
        tally.latency.extend([seconds])
        tally.given_up += 1
        if draw is not None and draw.__class__ is not Unit:
            if draw.batch is not None or draw.given_up:
                return
            draw.given_up = True
        if call.cluster is None or call.cluster.first(tally.batch_latency):
            tally.batch_latency.extend([seconds])
            tally.given_up_batches += 1

    def failed(self, call: Call, error: ServingError) -> bool:
        """A request of this arm failed: count it, and say whether stable answers it instead.

        An input that the canary's model refuses is the client's fault if stable refuses it too, so
        that is counted once stable has answered. Without a shield stable is not asked: refused
        inputs are counted in both arms, if there are two.
        """
        refused = isinstance(error, InvalidRequest)
        if self.splitter.refusals_tell if refused else not isinstance(error, Overloaded):
            self.count_failure(call, doubtful=refused)
        if self.arm == STABLE or call.unseen:
            return False
        judge = self if refused else None
        return self.splitter.take_over(call, judge)

    def count_failure(self, call: Call, *, doubtful: bool = False) -> None:
        """Count a failed request; of a batch, and of a unit that sticks to its arm, the first.

        One that is `doubtful`, as it may be the client's fault, is not the breaker's business.
        """
        tally, draw = self.tally(call.replica), call.draw
        if isinstance(draw, Unit):
            if not draw.fails(tally):
                return
        else:
            if draw is None and (unit := self.splitter.id_of(call)):
                if unit.failed:
                    return
                unit.failed, draw = True, unit
            tally.requests += 1
        cluster = call.cluster or Cluster()
        if self.arm == CANARY and not doubtful:
            breaker = self.splitter.breaker
            # One who tries again may bring an input that stable fails as well. Requests that waited
            # in vain are no batches, but reason enough to send no more.
            if cluster.first(breaker) or not call.sent:
                breaker.failed()
        tally.failed += 1
        cluster.count_failure(self, tally, draw)

    def label(self, replica: str, *, wrong: bool) -> None:
        """Count a label of an answer that a replica gave."""
        tally = self.tally(replica)
        tally.labels += 1
        tally.wrong += wrong

    def report(self) -> Iterator[dict[str, Any]]:
        """A row a replica."""
        for replica, tally in self.tallies.items():
            yield {
                "rollout": self.rollout,
                "epoch": self.epoch,
                "arm": self.arm,
                "replica": replica,
                **tally.to_dict(),
            }
