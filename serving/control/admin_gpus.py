"""The admin API's routes of GPUs: translates, decides nothing.

GET  /v1/gpus                  {"gpus": […], "nodes": […], "absent": […]}: see `gpu_views`
POST /v1/gpus/UUID/cordon      {"actor", "reason"} → {"uuid"}
POST /v1/gpus/UUID/uncordon    {"actor", "reason"} → {"uuid"}

A UUID may be cut short where it stays unique; the answer has it whole.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.control.bodies import check_keys, json_object, who
from serving.control.controller import Controller
from serving.control.gpu_views import gpus_view


def gpu_routes(controller: Controller) -> list[Route]:
    """Every route of this module."""

    async def show(_: Request) -> Response:
        return JSONResponse(
            gpus_view(controller.gpus, controller.ledger.gpu_price, controller.placer.stays)
        )

    async def cordon(request: Request) -> Response:
        body = await json_object(request)
        check_keys(body, {"actor", "reason"})
        uuid = await controller.gpus.cordon(request.path_params["uuid"], **who(body))
        return JSONResponse({"uuid": uuid})

    async def uncordon(request: Request) -> Response:
        body = await json_object(request)
        check_keys(body, {"actor", "reason"})
        uuid = await controller.gpus.uncordon(request.path_params["uuid"], **who(body))
        return JSONResponse({"uuid": uuid})

    return [
        Route("/v1/gpus", show),
        Route("/v1/gpus/{uuid}/cordon", cordon, methods=["POST"]),
        Route("/v1/gpus/{uuid}/uncordon", uncordon, methods=["POST"]),
    ]
