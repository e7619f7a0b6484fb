"""Every route of the gateway but inference: health, metadata, configuration, repository index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from serving import __version__
from serving.core import metadata
from serving.core.metadata import IndexEntry
from serving.core.protocol import encode_error
from serving.core.routing import Arm
from serving.errors import InvalidRequest, ServingError, Unavailable, Unsupported
from serving.gateway.routes import Routes

# What works, under the names that clients look for.
EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "schedule_policy",
)

# What clients call of extensions that are not there: a 404 would read as an unknown model.
_ABSENT: Final = {
    "statistics": (
        "/v2/models/{model}/stats",
        "/v2/models/{model}/versions/{version}/stats",
    ),
    "model_repository": ("/v2/repository/models/{model}/{action}",),
    "system_shared_memory": ("/v2/systemsharedmemory/{rest:path}",),
    "cuda_shared_memory": ("/v2/cudasharedmemory/{rest:path}",),
    "trace": ("/v2/trace/setting", "/v2/models/{model}/trace/setting"),
    "logging": ("/v2/logging",),
}


def create_app(routes: Routes, server_name: str) -> Starlette:
    """The Starlette application over `routes`."""
    api = _Api(routes, server_name)
    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    app = Starlette(
        routes=[
            Route("/v2", api.server_metadata),
            Route("/v2/", api.server_metadata),
            Route("/v2/health/live", api.live),
            Route("/v2/health/ready", api.ready),
            *(Route(base, api.model_metadata) for base in (model, version)),
            *(Route(base + "/ready", api.model_ready) for base in (model, version)),
            *(Route(base + "/config", api.model_config) for base in (model, version)),
            # The connection takes these itself; here are the methods that they do not have.
            *(Route(base + "/infer", api.infer, methods=["POST"]) for base in (model, version)),
            Route("/v2/repository/index", api.repository_index, methods=["POST"]),
            *_absent_routes(),
        ],
        exception_handlers={
            ServingError: _serving_error,
            HTTPException: _http_error,
            ClientDisconnect: _nobody,
            Exception: _unknown_error,
        },
    )
    # A redirect would quote the Host header, and no client of the protocol needs one.
    app.router.redirect_slashes = False
    return app


def _absent_routes() -> Iterator[Route]:
    for extension, paths in _ABSENT.items():

        async def refuse(request: Request, extension: str = extension) -> Response:
            raise Unsupported(
                f"this server does not have the extension {extension!r}; GET /v2 lists what it has"
            )

        yield from (Route(path, refuse, methods=["GET", "POST"]) for path in paths)


class _Api:
    def __init__(self, routes: Routes, server_name: str) -> None:
        self._routes = routes
        self._server_name = server_name

    async def server_metadata(self, request: Request) -> Response:
        return _json(metadata.server_metadata(self._server_name, __version__, EXTENSIONS))

    async def live(self, request: Request) -> Response:
        return _json(metadata.server_live(True))

    async def ready(self, request: Request) -> Response:
        ready = self._routes.ready
        return _json(metadata.server_ready(ready), 200 if ready else 503)

    async def model_metadata(self, request: Request) -> Response:
        arm = self._arm(request)
        versions = sorted(self._routes.table.models[arm.model].arms, key=int)
        return _json(metadata.model_metadata(arm, versions))

    async def model_ready(self, request: Request) -> Response:
        model, version = _names(request)
        try:
            ready = self._routes.arm(model, version).accepts
        except Unavailable:
            ready = False
        return _json(metadata.model_ready(model, ready), 200 if ready else 400)

    async def model_config(self, request: Request) -> Response:
        return _json(metadata.model_config(self._arm(request)))

    async def infer(self, request: Request) -> Response:
        raise AssertionError("inference is not for Starlette")

    async def repository_index(self, request: Request) -> Response:
        body = await request.body()
        try:
            options = orjson.loads(body) if body else {}
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the body is not valid JSON: {error}") from error
        only_ready = options.get("ready", False) if isinstance(options, dict) else None
        if not isinstance(only_ready, bool):
            raise InvalidRequest('the body must be empty or {"ready": true|false}')
        entries = [self._entry(name, v) for name, v in self._versions()]
        return _json(metadata.repository_index(entries, only_ready))

    def _versions(self) -> Iterator[tuple[str, str]]:
        for route in self._routes.table.models.values():
            for version in sorted(route.arms, key=int):
                yield route.name, version

    def _entry(self, model: str, version: str) -> IndexEntry:
        batcher = self._routes.arm(model, version)
        if batcher.accepts:
            return IndexEntry(model, version, "READY", "" if batcher.ready else "asleep")
        return IndexEntry(model, version, "UNAVAILABLE", "no replica is connected")

    def _arm(self, request: Request) -> Arm:
        return self._routes.arm(*_names(request)).arm


def _names(request: Request) -> tuple[str, str | None]:
    return request.path_params["model"], request.path_params.get("version")


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_error(message), status, headers, media_type="application/json")


async def _serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    seconds = error.retry_after
    headers = None if seconds is None else {"retry-after": str(seconds)}
    return _error(str(error), error.http_status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(message, error.status_code, dict(error.headers or {}))


async def _nobody(request: Request, error: Exception) -> Response:
    """The client went away in the middle of its body: what is answered goes nowhere."""
    return Response()


async def _unknown_error(request: Request, error: Exception) -> Response:
    return _error("internal error", 500)
