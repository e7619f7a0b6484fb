"""Bodies and query strings of the admin API, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

from serving.control.operations import NOBODY
from serving.errors import InvalidRequest

MAX_BODY: Final = 1 << 20
_LONGEST: Final = {"actor": 200, "reason": 2000}


async def json_body(request: Request) -> Any:
    """The body, which must be JSON. Raises `InvalidRequest`."""
    # A web page of any origin may post text or a form; JSON only after the browser has asked us.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise InvalidRequest("expected content-type: application/json")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise InvalidRequest(f"the body exceeds {MAX_BODY} bytes")
    except ClientDisconnect as error:
        raise InvalidRequest("the client went away") from error
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error


async def json_object(request: Request) -> dict[str, Any]:
    """The body, which must be a JSON object. Raises `InvalidRequest`."""
    parsed = await json_body(request)
    if not isinstance(parsed, dict):
        raise InvalidRequest("the body is not a JSON object")
    return parsed


def check_keys(body: Mapping[str, Any], allowed: set[str]) -> None:
    """Raise `InvalidRequest` where the body has another key."""
    if unknown := sorted(body.keys() - allowed):
        raise InvalidRequest(
            f"unknown key {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}"
        )


def text(body: Mapping[str, Any], key: str) -> str:
    """A string that must be there. Raises `InvalidRequest`."""
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{key} is missing, or is no string")
    return value


def who(body: Mapping[str, Any]) -> dict[str, str]:
    """Who asks and why, as the audit log has it. Raises `InvalidRequest`."""
    found = {"actor": body.get("actor") or NOBODY, "reason": body.get("reason") or ""}
    for key, value in found.items():
        if not isinstance(value, str) or len(value) > _LONGEST[key] or not _printable(value):
            raise InvalidRequest(
                f"{key} is a string of at most {_LONGEST[key]} printable characters"
            )
    return found


def _printable(value: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in value)


def query(request: Request, allowed: set[str]) -> dict[str, str]:
    """The query's parameters. Raises `InvalidRequest` for one that is not allowed."""
    check_keys(request.query_params, allowed)
    return dict(request.query_params)


def number(given: Mapping[str, str], key: str, least: int, most: int) -> int | None:
    """An integer of the query, or None where it is absent. Raises `InvalidRequest`."""
    if key not in given:
        return None
    value = given[key]
    if not (value.isascii() and value.isdecimal() and least <= int(value[:20]) <= most):
        raise InvalidRequest(f"{key} is an integer from {least} to {most}, not {value!r}")
    return int(value)


def truth(given: Mapping[str, str], key: str) -> bool | None:
    """True or false of the query, or None where it is absent. Raises `InvalidRequest`."""
    value = given.get(key)
    if value not in (None, "true", "false"):
        raise InvalidRequest(f"{key} is true or false, not {value!r}")
    return None if value is None else value == "true"
