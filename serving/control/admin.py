"""The admin API over HTTP: translates, decides nothing.

GET  /healthz      200 while the reconcile loop runs
GET  /metrics      Prometheus text format
GET  /v1/status    what runs
GET  /v1/routes    the published route table
GET  /v1/plan      which GPU each replica is on or goes to, or why to none
POST /v1/apply     {"config": {...}, "dry_run": bool, "actor", "reason"} → the plan
/v1/rollouts, /v1/audit, /v1/feedback: see `serving.control.admin_rollouts`
/v1/gpus: see `serving.control.admin_gpus`
/v1/cost: see `serving.control.admin_cost`

An error is {"error": sentence, "slug": slug} with the error's HTTP status.
"""

from __future__ import annotations

import ipaddress
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.control import metrics
from serving.control.admin_cost import cost_routes
from serving.control.admin_gpus import gpu_routes
from serving.control.admin_rollouts import rollout_routes
from serving.control.bodies import check_keys, json_object, who
from serving.control.controller import Controller
from serving.control.status import status
from serving.errors import InvalidRequest, ServingError, Unavailable

log = logging.getLogger(__name__)

_SLUGS: Final = {404: "not_found", 405: "method_not_allowed"}

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(controller: Controller, *, host: str, ray_version: str) -> Starlette:
    """The admin application. If `host`, where it listens, is loopback, so must Host headers be."""

    async def healthz(_: Request) -> Response:
        if controller.alive:
            return JSONResponse({"ok": True})
        return JSONResponse({"ok": False, "error": "the reconcile loop is down"}, 503)

    async def scrape(_: Request) -> Response:
        if not controller.totals_are_current:
            raise Unavailable("just restarted: the gateways have not repeated their counts yet")
        body = metrics.exposition(controller, ray_version)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    async def get_status(_: Request) -> Response:
        return JSONResponse(status(controller))

    async def get_routes(_: Request) -> Response:
        return JSONResponse(dict(controller.board.plain))

    async def get_plan(_: Request) -> Response:
        return JSONResponse(controller.plan())

    async def post_apply(request: Request) -> Response:
        body = await json_object(request)
        check_keys(body, {"config", "dry_run", "actor", "reason"})
        config, dry_run = body.get("config"), body.get("dry_run", False)
        if not isinstance(config, dict) or not isinstance(dry_run, bool):
            raise InvalidRequest('expected {"config": {…}, "dry_run": true or false}')
        return JSONResponse(await controller.apply(config, dry_run=dry_run, **who(body)))

    routes = [
        Route("/healthz", healthz),
        Route("/metrics", scrape),
        Route("/v1/status", get_status),
        Route("/v1/routes", get_routes),
        Route("/v1/plan", get_plan),
        Route("/v1/apply", post_apply, methods=["POST"]),
        *rollout_routes(controller),
        *gpu_routes(controller),
        *cost_routes(controller),
    ]
    guard = [Middleware(_LoopbackHostOnly)] if _is_loopback(host) else []
    handlers: dict[Any, Any] = {
        ServingError: _operator_error,
        HTTPException: _http_error,
        Exception: _unknown_error,
    }
    return Starlette(routes=routes, middleware=guard, exception_handlers=handlers)


async def _operator_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return JSONResponse({"error": str(error), "slug": error.slug}, error.http_status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    slug = _SLUGS.get(error.status_code, "invalid_request")
    return JSONResponse({"error": error.detail, "slug": slug}, error.status_code)


async def _unknown_error(_: Request, error: Exception) -> Response:
    reference = uuid.uuid4().hex[:12]
    log.error("admin request %s failed", reference, exc_info=error)
    return JSONResponse({"error": f"internal error {reference}", "slug": "internal"}, 500)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _LoopbackHostOnly:
    """Refuses a Host header that is not loopback: a web page must not reach us by DNS rebinding."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Request(scope).headers.get("host", "")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if not _is_loopback(name.strip("[]")):
                sentence = f"the Host header {host!r} is not this machine's loopback address"
                response = JSONResponse({"error": sentence, "slug": "invalid_request"}, 400)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
