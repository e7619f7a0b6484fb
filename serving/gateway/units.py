"""What sticks to an arm, users say, as far as this gateway remembers it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from serving.core.assignment import unit_point
from serving.gateway.trials import Unit

MOST: Final = 1 << 16


class Units:
    """The units of one epoch, the latest `MOST`. One that is forgotten counts again when it comes.

    Of both arms together: a unit is forgotten after so many others, whichever arm it is in.
    """

    __slots__ = ("_known", "_salt")

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        # By a hash: a unit may be long.
        self._known: OrderedDict[int, Unit] = OrderedDict()

    def of(self, name: bytes) -> Unit:
        """The unit of this name."""
        known, key = self._known, hash(name)
        unit = known.get(key)
        if unit is not None:
            known.move_to_end(key)
            return unit
        unit = known[key] = Unit(unit_point(self._salt, name))
        if len(known) > MOST:
            known.popitem(last=False)
        return unit
