"""The admin API's routes of rollouts, the audit log and feedback: translates, decides nothing.

GET  /v1/rollouts?model=&active=&limit=   {"rollouts": […]}, newest first
POST /v1/rollouts                         {"model", "to", "plan"?, "actor", "reason"} → the rollout
POST /v1/rollouts/plan                    {"model", "to", "plan"?} → what it would do
GET  /v1/rollouts/NAME                    the rollout of an id, or a model's newest
POST /v1/rollouts/NAME/COMMAND            {"actor", "reason", "expected_state"?} → the rollout
GET  /v1/audit?after=&limit=&subject=     {"entries": […]}, oldest first; without after the last
GET  /v1/audit/verify?expect=             {"sentence", "end"}, or an error that names what is wrong
POST /v1/feedback                         {"request_id", "label"} or a list → {"accepted": count}

A COMMAND is pause, resume, promote, approve, abort or rollback. With expected_state it is carried
out only where the rollout is in that state. `end` and `expect` are HASH@COUNT: where the log ends,
and where it did once.
"""

from __future__ import annotations

import re
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.config_types import VERSION_PATTERN
from serving.control.bodies import (
    check_keys,
    json_body,
    json_object,
    number,
    query,
    text,
    truth,
    who,
)
from serving.control.controller import Controller
from serving.core.rollout_states import State
from serving.errors import InvalidRequest

_LISTED: Final = 100
_MOST: Final = 1000
_WHO: Final = {"actor", "reason"}
_WANTED: Final = {"model", "to", "plan"}
_STATES: Final = tuple(state.value for state in State)


def rollout_routes(controller: Controller) -> list[Route]:
    """Every route of this module."""

    async def list_rollouts(request: Request) -> Response:
        given = query(request, {"model", "active", "limit"})
        found = await controller.readings.list_rollouts(
            model=given.get("model"),
            active=truth(given, "active"),
            limit=number(given, "limit", 1, _MOST) or _LISTED,
        )
        return JSONResponse({"rollouts": found})

    async def start(request: Request) -> Response:
        body = await json_object(request)
        check_keys(body, _WANTED | _WHO)
        model, to, plan = _wanted(body)
        return JSONResponse(await controller.start_rollout(model, to, plan, **who(body)))

    async def plan(request: Request) -> Response:
        body = await json_object(request)
        check_keys(body, _WANTED)
        return JSONResponse(await controller.plan_rollout(*_wanted(body)))

    async def show(request: Request) -> Response:
        return JSONResponse(await controller.show_rollout(request.path_params["name"]))

    async def command(request: Request) -> Response:
        body = await json_object(request)
        check_keys(body, _WHO | {"expected_state"})
        expected = body.get("expected_state")
        if expected is not None and expected not in _STATES:
            raise InvalidRequest(f"expected_state is {expected!r}; allowed: {', '.join(_STATES)}")
        path = request.path_params
        told = await controller.command_rollout(
            path["name"], path["command"], expected_state=expected, **who(body)
        )
        return JSONResponse(told)

    async def audit(request: Request) -> Response:
        given = query(request, {"after", "limit", "subject"})
        entries = await controller.readings.audit(
            after=number(given, "after", 0, 1 << 62),
            limit=number(given, "limit", 1, _MOST) or _LISTED,
            subject=given.get("subject"),
        )
        return JSONResponse({"entries": entries})

    async def verify(request: Request) -> Response:
        found = await controller.readings.verify_audit(query(request, {"expect"}).get("expect"))
        return JSONResponse({"sentence": found.sentence, "end": str(found)})

    async def feedback(request: Request) -> Response:
        return JSONResponse({"accepted": controller.add_feedback(await json_body(request))})

    return [
        Route("/v1/rollouts", list_rollouts),
        Route("/v1/rollouts", start, methods=["POST"]),
        Route("/v1/rollouts/plan", plan, methods=["POST"]),
        Route("/v1/rollouts/{name}", show),
        Route("/v1/rollouts/{name}/{command}", command, methods=["POST"]),
        Route("/v1/audit", audit),
        Route("/v1/audit/verify", verify),
        Route("/v1/feedback", feedback, methods=["POST"]),
    ]


def _wanted(body: dict[str, Any]) -> tuple[str, str, Any]:
    plan = body.get("plan")
    if plan is not None and not isinstance(plan, str | dict):
        raise InvalidRequest("plan is the name of a plan, or a mapping")
    to = body.get("to")
    # A version written without quotes is a number.
    to = str(to) if isinstance(to, int) and not isinstance(to, bool) else to
    version = text({"to": to}, "to")
    if not re.fullmatch(VERSION_PATTERN, version):
        raise InvalidRequest(
            f'to: {version!r} is no version; allowed: a number like "3", an @alias'
        )
    return text(body, "model"), version, plan
