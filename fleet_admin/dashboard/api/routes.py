"""Routes of the API."""

import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Final

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fleet_admin.dashboard.api.endpoint import Endpoint
from fleet_admin.dashboard.api.endpoints import ENDPOINTS
from fleet_admin.dashboard.api.openapi import openapi
from fleet_admin.dashboard.api.values import to_json
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.workers import Workers
from fleet_common.validation import plain_sentence

PREFIX: Final = "/api/v1"
_JSON: Final = "application/json"


def api_routes(services: Services, workers: Workers, *, now: Callable[[], datetime]) -> list[Route]:
    """Return the routes of all endpoints, and of the document that describes them."""

    async def document(_request: Request) -> Response:
        return JSONResponse(openapi(ENDPOINTS, prefix=PREFIX))

    routes = [_route(each, services=services, workers=workers, now=now) for each in ENDPOINTS]
    return [Route(f"{PREFIX}/openapi.json", document), *routes]


def _route(endpoint: Endpoint, *, services: Services, workers: Workers, now: Callable[[], datetime]) -> Route:
    async def answer(request: Request) -> Response:
        visit = Visit(request, request.state.admission, services, now())
        if not visit.visitor.role.includes(endpoint.role):
            raise Problem(403, f"The key or account of {visit.visitor.name} may look, and not do this.")
        return await workers.run(partial(_answer, endpoint, visit), account=visit.visitor.name)

    return Route(PREFIX + endpoint.path, answer, methods=[endpoint.method])


def _answer(endpoint: Endpoint, visit: Visit) -> Response:
    asked = _parameters(endpoint.parameters, visit) if endpoint.method != "DELETE" else None
    return JSONResponse(to_json(endpoint.answer(visit, asked)))


def _parameters(model: type[BaseModel], visit: Visit) -> BaseModel:
    """Return what was asked for.

    Raises:
        Problem: It cannot be understood.
    """
    admission = visit.admission
    if visit.request.method in {"GET", "HEAD"}:
        if many := sorted(name for name, values in admission.query.items() if len(values) > 1):
            raise Problem(400, f"The parameter {many[0][:40]} is given several times.")
        given: object = {name: values[0] for name, values in admission.query.items()}
    else:
        given = _body(visit)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:60] or "body"
        raise Problem(400, f"The parameter {where} cannot be used: {plain_sentence(first)}.") from None


def _body(visit: Visit) -> object:
    kind = visit.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if visit.visitor.by != "key" or kind != _JSON:
        raise Problem(415, "Changes are sent as JSON (Content-Type: application/json), with an API key.")
    try:
        return json.loads(visit.admission.body)
    except (ValueError, RecursionError):
        raise Problem(400, "The body is no JSON.") from None
