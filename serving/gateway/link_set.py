"""The links of one model version: which there are, and which takes the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from serving.core.routing import Endpoint
from serving.gateway.infer import Call
from serving.gateway.links import ReplicaLink

Link = ReplicaLink[list[Call]]


class LinkSet:
    """Links by endpoint: those that the route table lists, and those that still drain."""

    def __init__(self) -> None:
        self.by_endpoint: dict[Endpoint, Link] = {}
        # So many can take batches; see `count`.
        self.connected = 0
        # The one that takes no other batch until it has taken the next suspects.
        self.reserved: Link | None = None
        self._listed: tuple[Endpoint, ...] = ()
        self._turn = 0

    def up(self) -> list[Link]:
        """Those that can be given batches."""
        return [link for link in self.by_endpoint.values() if link.up]

    def count(self) -> None:
        """Note how many can take batches."""
        self.connected = len(self.up())

    def batches(self) -> Iterator[list[Call]]:
        """All that are at replicas."""
        for link in self.by_endpoint.values():
            yield from link.batches()

    def free(self) -> Link | None:
        """The one with the fewest batches in flight, in turn among equals, but not `reserved`."""
        best, reserved = None, self.reserved
        least = oldest = 0
        self._turn += 1
        for link in self.by_endpoint.values():
            if link is reserved or not link.can_take():
                continue
            load = link.in_flight
            if best is None or load < least or (load == least and link.turn < oldest):
                best, least, oldest = link, load, link.turn
        return best

    def used(self, link: Link) -> None:
        """Note that it is another's turn."""
        link.turn = self._turn

    def follow(
        self, endpoints: Sequence[Endpoint], make: Callable[[Endpoint], Link], max_size: int
    ) -> None:
        """Begin to connect to those that are new; `max_size` is a batch's, for all of them."""
        self._listed = tuple(endpoints)
        for endpoint in endpoints:
            if link := self.by_endpoint.get(endpoint):
                link.undrain()
            else:
                link = self.by_endpoint[endpoint] = make(endpoint)
                link.start()
            link.max_size = max_size

    def let_go(self) -> list[int]:
        """Drain the links that are not listed, but not the last that can take batches.

        Returns the `max_size` of each of these that stay: they run batches under the settings that
        they began with.
        """
        links = dict(self.by_endpoint)
        listed = [links.pop(endpoint) for endpoint in self._listed if endpoint in links]
        replaced = not listed or any(link.up for link in listed)
        for link in links.values():
            if replaced or not link.up:
                link.drain()
        return [link.max_size for link in links.values() if link.up]

    def close(self) -> list[asyncio.Task[None]]:
        """Drop all. Returns what has yet to notice its cancellation."""
        links, self.by_endpoint = self.by_endpoint, {}
        self.connected = 0
        return [task for link in links.values() if (task := link.close()) is not None]
