"""What sticks to an arm, users say: where a request names it, and what is remembered of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from serving.core.assignment import unit_point
from serving.gateway.headers import COOKIE
from serving.gateway.trials import Unit

if TYPE_CHECKING:
    from serving.gateway.infer import Call

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


def unit_headers(unit: str) -> list[bytes]:
    """The request headers that a kind of unit is found in; names are lower-case."""
    kind, _, name = unit.partition(":")
    return {"header": [name.lower().encode()], "cookie": [COOKIE]}.get(kind, [])


def unit_finder(unit: str) -> Callable[[Call], bytes | None]:
    """Finds a request's unit, which is of a kind that `Split` names."""
    kind, _, name = unit.partition(":")
    if kind == "parameter":
        return lambda call: _text(call.request.parameters.get(name))
    if kind == "cookie":
        return lambda call: _cookie(call.sink.header(COOKIE), name.encode())
    if kind == "header":
        header = name.lower().encode()
        return lambda call: call.sink.header(header)
    return lambda call: call.sink.given_id


def _text(value: object) -> bytes | None:
    return None if value is None else str(value).encode()


def _cookie(header: bytes | None, name: bytes) -> bytes | None:
    """A cookie's value. Whatever else is in the header, well-formed or not, is passed over."""
    for pair in (header or b"").split(b";"):
        key, separator, value = pair.partition(b"=")
        if separator and key.strip() == name:
            return value.strip().strip(b'"')
    return None
