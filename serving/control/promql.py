"""A PromQL trigger: one instant query to a Prometheus, its value against the threshold.

Whatever is not one finite number is "unknown": nobody is taken back, and nobody passes, because
Prometheus is away or its query matches nothing.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import orjson

from serving.control.credentials import secret
from serving.control.outbound import Answer, NoAnswer, fetch
from serving.core.rollout_spec import Trigger
from serving.core.rollout_types import ProviderState, Rollout
from serving.core.urls import place

_COMPARED: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
# Not str.format: braces are PromQL's own.
_VARIABLE: Final = re.compile(r"\{(model|stable|canary|rollout)\}")
_LONGEST_ERROR: Final = 200


def ask(trigger: Trigger, rollout: Rollout) -> ProviderState:
    """What Prometheus says now. Blocks for the trigger's `timeout_s` at most; never raises."""
    try:
        value = _value(_query(trigger, rollout))
    except NoAnswer as error:
        return ProviderState("unknown", message=str(error))
    limit = f"{trigger.operator} {trigger.threshold:g}"
    bad = _COMPARED[trigger.operator](value, trigger.threshold)
    message = f"the query gives {value:g}, bad is {limit}"
    return ProviderState("fail" if bad else "ok", value=value, message=message)


def rendered(query: str, rollout: Rollout) -> str:
    """The query with {model}, {stable}, {canary} and {rollout} put in, escaped for a string."""
    values = {
        "model": rollout.model,
        "stable": rollout.stable,
        "canary": rollout.canary,
        "rollout": rollout.id,
    }

    def put_in(variable: re.Match[str]) -> str:
        return re.sub(r'([\\"\'])', r"\\\1", values[variable[1]])

    return _VARIABLE.sub(put_in, query)


def _query(trigger: Trigger, rollout: Rollout) -> Any:
    """The `data` of Prometheus's answer. Raises `NoAnswer`."""
    parameters = {"query": rendered(trigger.query, rollout), "timeout": f"{trigger.timeout_s:g}s"}
    url = _endpoint(trigger.url, urlencode(parameters))
    token = secret(trigger.secret_env)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = fetch("GET", url, headers=headers, timeout_s=trigger.timeout_s)
    document = _document(answer)
    if answer.ok and document.get("status") == "success":
        return document.get("data")
    about = str(document.get("error", "")).strip()[:_LONGEST_ERROR]
    raise NoAnswer(
        f"Prometheus at {place(url)} refused the query ({answer.status})"
        + (f": {' '.join(about.split())}" if about else "")
    )


def _endpoint(base: str, query: str) -> str:
    try:
        parts = urlsplit(base)
    except ValueError as error:
        raise NoAnswer("the URL is malformed") from error
    path = parts.path.rstrip("/") + "/api/v1/query"
    return parts._replace(path=path, query=query, fragment="").geturl()


def _document(answer: Answer) -> dict[str, Any]:
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        document = None
    if isinstance(document, dict):
        return document
    if answer.ok:
        raise NoAnswer("Prometheus answered with something that is no JSON object")
    return {}


def _value(data: Any) -> float:
    """The one finite number in an instant query's `data`. Raises `NoAnswer`."""
    match data:
        case {"resultType": "scalar", "result": [_, str(number)]}:
            pass
        case {"resultType": "vector", "result": [{"value": [_, str(number)]}]}:
            pass
        case {"resultType": "vector", "result": []}:
            raise NoAnswer("the query matches no series")
        case {"resultType": "vector", "result": [_, _, *_] as samples}:
            raise NoAnswer(f"the query gives {len(samples)} series; aggregate them to one")
        case {"resultType": str(kind)}:
            raise NoAnswer(f"the query gives a {kind} that is no number; allowed: scalar, vector")
        case _:
            raise NoAnswer("Prometheus answered without a result")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise NoAnswer(f"the query gives {number[:20]}, which is no finite number")
    return value
