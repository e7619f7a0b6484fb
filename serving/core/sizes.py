"""How many replicas an application is to have, and when a changed number has come about: pure.

The number is no part of what an application is: it changes while the application runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from serving.core.scaling import Scaling


@dataclass(frozen=True, slots=True)
class Size:
    """`count` replicas, or with `scaling` as many as that says, from `count` on."""

    count: int
    scaling: Scaling | None = None

    @property
    def least(self) -> int:
        """The fewest replicas."""
        return self.count if self.scaling is None else self.scaling.least

    @property
    def most(self) -> int:
        """The most replicas."""
        return self.count if self.scaling is None else self.scaling.most

    def grows_from(self, old: Size) -> bool:
        """Whether more replicas than before may have to start for it."""
        return self.least > old.least

    def is_reached(self, old: Size, ready: int) -> bool:
        """Whether `ready` replicas are what was changed from `old`.

        Only a bound that was tightened is waited for: what has died since is no matter of a change.
        """
        enough = not self.grows_from(old) or ready >= self.least
        return enough and (self.most >= old.most or ready <= self.most)

    def follows_otherwise(self, old: Size) -> bool:
        """Whether it follows the load by other settings than `old`, but for the bounds."""
        if self.scaling is None or old.scaling is None:
            return False
        return self.scaling != replace(old.scaling, least=self.least, most=self.most)

    def __str__(self) -> str:
        """`3`, or `1 to 4`."""
        return str(self.count) if self.scaling is None else f"{self.least} to {self.most}"
