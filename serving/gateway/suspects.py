"""What is sent again after a replica was lost, and to which replica.

Any request that a lost replica had may be what killed it. These suspects are sent again in a few
groups (`core.batching.suspect_groups`), one group at a time, to a replica that has nothing else
meanwhile; the other replicas serve on. A request that kills every replica it meets costs three
replicas at most, two where at most 8 requests were lost with it, and is then answered 503.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from serving.core.batching import SHADOW_LEVEL, RequestQueue, suspect_groups
from serving.core.routing import Arm
from serving.errors import Unavailable
from serving.gateway.infer import Call
from serving.gateway.link_set import Link, LinkSet
from serving.gateway.room import no_replica

# A request that is alone at a replica that is lost, and not for the first time, is not sent again.
MAX_LOSSES_ALONE: Final = 2


class Suspects:
    """The suspects in the queue of one version, whose replicas take turns with everything else."""

    def __init__(self, queue: RequestQueue[Call], links: LinkSet) -> None:
        self._queue = queue
        self._links = links
        self._others_turn = False

    def add(self, batch: list[Call], lost: int, arm: Arm) -> None:
        """Queue the requests of a lost batch as suspects, unless one has proved to be guilty.

        `lost` requests, this batch's and others, were at the replica.
        """
        alive = [call for call in batch if not call.done]
        if alive and alive[0].level == SHADOW_LEVEL:
            # A copy may kill one replica, but not the next.
            for call in alive:
                call.fail(no_replica(arm))
            return
        for call in alive:
            call.losses += 1
            call.sent = 0.0
            call.suspect = True
        if lost == 1 and alive and alive[0].losses >= MAX_LOSSES_ALONE:
            alive[0].fail(
                Unavailable(
                    f"model {arm.model!r} version {arm.version}: the replica was lost during the "
                    f"run, {alive[0].losses} times in a row",
                    retry_after_s=1.0,
                )
            )
            return
        again = any(call.losses > 1 for call in alive)
        for group in suspect_groups(alive, lost, again=again):
            self._queue.push_suspects(group)

    def dispatch(
        self,
        take: Callable[[], list[Call]],
        send: Callable[[Link, list[Call]], None],
        send_others: Callable[[], None],
    ) -> None:
        """Send the next group of suspects, which `take` gives, or reserve a replica for it.

        Never more than one replica at a time is kept from the others. Where there is no other
        replica they take turns, so that neither starves.
        """
        queue = self._queue
        reserved, self._links.reserved = self._links.reserved, None
        links = self._links.up()
        if not queue.suspect_rows or not links or any(link.exclusive for link in links):
            return
        if len(links) == 1 and self._others_turn:
            self._others_turn = False
            send_others()
        if reserved not in links:
            reserved = min(links, key=lambda link: link.in_flight)
        while queue.suspect_rows and not reserved.in_flight:
            self._others_turn = True
            send(reserved, take())
        if queue.suspect_rows and not reserved.exclusive:
            self._links.reserved = reserved
