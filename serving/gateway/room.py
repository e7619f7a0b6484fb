"""How much may wait at one model version: what cannot be answered in time is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.core.batching import RequestQueue, ServiceModel
from serving.core.routing import Arm
from serving.errors import Overloaded, Unavailable
from serving.gateway.infer import Call, monotonic

if TYPE_CHECKING:
    from serving.gateway.link_set import LinkSet


class Room:
    """The room in a queue, by the run times that its replicas have had so far."""

    def __init__(self, queue: RequestQueue[Call], service: ServiceModel, links: LinkSet) -> None:
        # So many rows may wait without a second thought.
        self.rows = 0
        self._queue = queue
        self._service = service
        self._links = links

    def check(self, call: Call, arm: Arm, max_rows: int, ahead: int, deadline: float) -> None:
        """Raise `Overloaded` unless the call can be answered by `deadline`.

        `ahead` rows wait before it, `max_rows` is a run's.
        """
        if ahead + call.rows > arm.queue_max_rows:
            raise Overloaded(
                f"model {arm.model!r} version {arm.version}: {ahead} rows are waiting, "
                f"at most {arm.queue_max_rows} may",
                retry_after_s=1.0,
            )
        wait = self._drain_s(ahead, max_rows) / max(1, self._links.connected)
        allowed = min(arm.queue_max_wait_s, deadline - monotonic())
        if wait > allowed:
            raise Overloaded(
                f"model {arm.model!r} version {arm.version}: the estimated wait is "
                f"{wait * 1e3:.0f} ms, at most {max(0.0, allowed) * 1e3:.0f} ms is allowed",
                retry_after_s=wait,
            )

    def check_asleep(self, call: Call, arm: Arm) -> None:
        """Raise `Unavailable` unless the call may wait for the version's first replica."""
        waiting, rows = len(self._queue), self._queue.rows
        if waiting >= arm.wake_queue or rows + call.rows > arm.queue_max_rows:
            raise Unavailable(
                f"model {arm.model!r} version {arm.version}: it is asleep and about to wake; "
                f"{waiting} requests of {rows} rows are waiting, at most {arm.wake_queue} requests "
                f"of {arm.queue_max_rows} rows may",
                retry_after_s=2.0,
            )

    def _drain_s(self, rows: int, max_rows: int) -> float:
        """Expected time to run `rows` that wait, one run after another, in seconds."""
        queue = self._queue
        apart = queue.rerun_rows + queue.suspect_rows
        return self._service.drain(rows - apart, max_rows) + self._service.predict(
            apart, queue.singular_runs
        )

    def measure(self, arm: Arm, max_rows: int) -> None:
        """Work out how many rows may wait before a newcomer's wait has to be estimated."""
        if self._queue.singular_runs:
            # Each is a run of its own, however few rows it has.
            self.rows = 0
            return
        run = self._service.predict(max_rows)
        rows = arm.queue_max_rows
        if run > 0.0:
            batches = int(arm.queue_max_wait_s * self._links.connected / run)
            rows = min(rows, batches * max_rows)
        self.rows = rows


def no_replica(arm: Arm) -> Unavailable:
    """What is told to those who cannot wait for one."""
    return Unavailable(
        f"model {arm.model!r} version {arm.version}: no replica is ready", retry_after_s=2.0
    )
