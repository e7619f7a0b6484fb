"""The `parameters` objects of a request: free-form but for the names that are reserved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from serving.core.inference import NO_PARAMETERS
from serving.core.tensors import show
from serving.errors import InvalidRequest, Unsupported

# Integers that every JSON implementation keeps exact (RFC 7493, section 2.2).
MAX_INTEGER: Final = (1 << 53) - 1

# Features that this server does not have. Ignoring one would give a wrong answer without a word;
# clients send them switched off, too (`sequence_id` 0).
_RESERVED: Final = ("sequence_", "shared_memory_", "triton_")


def refuse_unknown(where: str, members: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Raise `InvalidRequest` if an object has members other than those `allowed`."""
    for name in members:
        if name not in allowed:
            raise InvalidRequest(
                f"{where} has an unknown member {show(name)}; it takes {', '.join(sorted(allowed))}"
            )


def read_parameters(where: str, raw: Any, levels: int) -> Mapping[str, Any]:
    """Check a `parameters` object; null stands for none.

    `levels` is how many more levels of JSON it may hold. Raises `InvalidRequest` for what is not an
    object or too deep, `Unsupported` for a reserved name that asks for something.
    """
    if raw is None:
        return NO_PARAMETERS
    if type(raw) is not dict:
        raise InvalidRequest(f"{where}: parameters must be an object, found {show(raw)}")
    for key, value in raw.items():
        if value and key.startswith(_RESERVED):
            raise Unsupported(f"{where}: parameter {show(key)} is not supported by this server")
        if type(value) is list or type(value) is dict:
            _check_depth(where, key, value, levels)
    return raw


def _check_depth(where: str, key: str, value: list[Any] | dict[str, Any], levels: int) -> None:
    layer: list[Any] = [value]
    while layer:
        if levels == 0:
            raise InvalidRequest(f"{where}: parameter {show(key)} is nested too deep")
        levels -= 1
        layer = [
            child
            for parent in layer
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is list or type(child) is dict
        ]


def read_integer(where: str, parameters: Mapping[str, Any], key: str) -> int:
    """A count: an integer from 0 to 2^53 - 1, 0 where absent or null. Raises `InvalidRequest`."""
    value = parameters.get(key)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise InvalidRequest(
            f"{where}: parameter {key!r} is {show(value)}; "
            f"it takes integers from 0 to {MAX_INTEGER}"
        )
    return value


def read_bool(where: str, parameters: Mapping[str, Any], key: str, default: bool) -> bool:
    """A switch, `default` where absent or null. Raises `InvalidRequest`."""
    value = parameters.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise InvalidRequest(
            f"{where}: parameter {key!r} is {show(value)}; it takes true and false"
        )
    return value
