"""The admin API's route of costs: translates, decides nothing.

GET /v1/cost    ?by=model,version,tenant,gpu,kind&since=SECONDS → see `cost_views.cost_view`

`since` is how many seconds back; without it all that there is.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.control.bodies import number, query
from serving.control.controller import Controller
from serving.control.cost_views import DIMENSIONS
from serving.errors import InvalidRequest

_LONGEST_S = 3650 * 86_400


def cost_routes(controller: Controller) -> list[Route]:
    """Every route of this module."""

    async def show(request: Request) -> Response:
        given = query(request, {"by", "since"})
        by = [name for name in given.get("by", "model,version").split(",") if name]
        for name in by:
            if name not in DIMENSIONS or by.count(name) > 1:
                raise InvalidRequest(
                    f"by names what to add up by, each once: {', '.join(DIMENSIONS)}; not {name!r}"
                )
        since = number(given, "since", 1, _LONGEST_S)
        return JSONResponse(await controller.cost(by, since))

    return [Route("/v1/cost", show)]
