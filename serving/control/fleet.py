"""The replicas as they announced themselves: who is there, in what state, how long ago."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from serving.core.routing import Endpoint

EXPIRY_S: Final = 8.0
"""Four missed announcements. A dead connection is noticed by the gateways themselves, at once."""

SURPLUS_EXPIRY_S: Final = 3.0
"""One missed announcement, of a replica whose replacement is there."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica's last announcement; `heard_at` is monotonic, in seconds."""

    info: Mapping[str, Any]
    heard_at: float

    @property
    def app(self) -> str:
        """The Serve application it belongs to."""
        return str(self.info["app"])

    @property
    def seat(self) -> str:
        """The Serve application that it is a replica of: a seat of its application, or that."""
        return str(self.info.get("seat") or self.app)

    @property
    def state(self) -> str:
        """ready, draining or failed."""
        return str(self.info["state"])

    @property
    def endpoint(self) -> Endpoint:
        """Its frame socket."""
        return Endpoint(
            str(self.info["replica"]),
            str(self.info["node"]),
            str(self.info.get("unix") or ""),
            str(self.info.get("tcp") or ""),
        )


class Fleet:
    """The book of announcements. Not thread-safe: it lives on the controller's loop."""

    def __init__(self) -> None:
        self._replicas: dict[tuple[str, str], Replica] = {}

    def announce(self, info: Mapping[str, Any], now: float) -> bool:
        """Take an announcement; whether it changed what is routed or reported."""
        key = (str(info["app"]), str(info["replica"]))
        before, after = self._replicas.get(key), Replica(dict(info), now)
        self._replicas[key] = after
        return before is None or (before.state, before.endpoint) != (after.state, after.endpoint)

    def expire(self, now: float, wanted: Mapping[str, int]) -> None:
        """Forget who has been silent for `EXPIRY_S`.

        `SURPLUS_EXPIRY_S` is enough where its application has more ready replicas than `wanted`:
        it was replaced.
        """
        ready = Counter(r.app for r in self._replicas.values() if r.state == "ready")
        oldest_first = sorted(self._replicas.items(), key=lambda item: item[1].heard_at)
        for key, replica in oldest_first:
            surplus = ready[replica.app] > wanted.get(replica.app, 0)
            if now - replica.heard_at > (SURPLUS_EXPIRY_S if surplus else EXPIRY_S):
                ready[replica.app] -= replica.state == "ready"
                del self._replicas[key]

    def forget_failed(self, apps: Collection[str]) -> None:
        """Forget what failed replicas of these applications said: they are tried again."""
        for key, replica in list(self._replicas.items()):
            if replica.app in apps and replica.state == "failed":
                del self._replicas[key]

    def replicas(self) -> list[Replica]:
        """Every replica, by application and name."""
        return [replica for _, replica in sorted(self._replicas.items())]

    def of(self, app: str) -> list[Replica]:
        """The replicas of an application, by name."""
        return sorted(
            (r for r in self._replicas.values() if r.app == app), key=lambda r: r.endpoint.replica
        )

    def endpoints(self, app: str, leaving: Collection[str] = ()) -> tuple[Endpoint, ...]:
        """The ready replicas of an application, but for those in seats that are `leaving`."""
        return tuple(
            r.endpoint for r in self.of(app) if r.state == "ready" and r.seat not in leaving
        )

    def departing(self, leaving: Collection[str]) -> frozenset[str]:
        """The replicas on their way out: they drain, or are in seats that are `leaving`."""
        return frozenset(
            r.endpoint.replica
            for r in self._replicas.values()
            if r.state == "draining" or r.seat in leaving
        )

    def error(self, app: str) -> str:
        """What a replica of the application said about its failed start, or an empty string."""
        return next((str(r.info.get("error")) for r in self.of(app) if r.state == "failed"), "")
