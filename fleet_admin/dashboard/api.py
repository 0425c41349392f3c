"""JSON API of the dashboard: the same data for programs, and an OpenAPI document generated from the endpoints."""

import json
import typing
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import DataclassSchema, FloatSchema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fleet_admin.columns import names_of, plain
from fleet_admin.dashboard.endpoints import ENDPOINTS, ApiEndpoint, NoParameters
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.serving import Workers
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.dashboard.visit import Visit
from fleet_common.validation import plain_sentence
from schemas.names import VERSION


class _Schemas(GenerateJsonSchema):
    """Schemas of what `plain` makes of views: with their properties, and null for what is no number."""

    def dataclass_schema(self, schema: DataclassSchema) -> dict[str, Any]:
        made, view = super().dataclass_schema(schema), schema["cls"]
        made["required"] = list(names_of(view))
        for name in names_of(view):
            if name not in made["properties"]:
                returned = typing.get_type_hints(getattr(view, name).fget)["return"]
                made["properties"][name] = TypeAdapter(returned).json_schema(schema_generator=_Schemas)
        return made

    def float_schema(self, schema: FloatSchema) -> dict[str, Any]:
        return {"anyOf": [super().float_schema(schema), {"type": "null"}]}


_REFERENCES: Final = "#/components/schemas/{model}"
_PROBLEMS: Final = {
    "400": "A parameter cannot be understood.",
    "401": "There is no valid key.",
    "403": "The key may only read.",
    "404": "There is nothing of that name.",
    "409": "The prefix is ambiguous, or this dashboard is not set up for it.",
    "413": "The request is too large.",
    "415": "The body is no JSON.",
    "429": "This account has too many running requests.",
    "503": "The database or the broker does not answer now.",
}
_PROBLEM: Final = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"status": {"type": "integer"}, "sentence": {"type": "string"}},
            "required": ["status", "sentence"],
        }
    },
    "required": ["error"],
}


def openapi(endpoints: Iterable[ApiEndpoint], *, prefix: str) -> dict[str, Any]:
    components: dict[str, Any] = {"Problem": _PROBLEM}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(prefix + endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fleet",
            "version": VERSION,
            "description": "What devices, edges and sessions did. A key is made with `fleet admin key add`.",
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(endpoint: ApiEndpoint, components: dict[str, Any]) -> dict[str, Any]:
    words = [part.strip("{}") for part in endpoint.path.split("/") if part]
    operation: dict[str, Any] = {
        "operationId": "_".join([endpoint.method.lower(), *words]),
        "summary": endpoint.summary,
        "responses": {
            "200": {
                "description": endpoint.summary,
                "content": {"application/json": {"schema": _schema(endpoint.result, components, "serialization")}},
            },
            **{status: _problem(words) for status, words in _PROBLEMS.items()},
        },
        "parameters": [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1, "maxLength": 200},
            }
            for name in endpoint.path_parameters
        ],
    }
    if endpoint.role is AccountRole.OPERATOR:
        operation["description"] = "For keys with the role operator."
    schema = _schema(endpoint.parameters, components, "validation")
    if endpoint.method == "GET":
        own = components[schema["$ref"].rpartition("/")[2]]
        required = own.get("required", ())
        operation["parameters"] += [
            {"name": name, "in": "query", "required": name in required, "schema": each}
            for name, each in own.get("properties", {}).items()
        ]
    elif endpoint.method == "POST":
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _problem(words: str) -> dict[str, Any]:
    schema = {"$ref": _REFERENCES.format(model="Problem")}
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def _schema(kind: Any, components: dict[str, Any], mode: Any) -> dict[str, Any]:  # noqa: ANN401 - a type; a literal
    schema = TypeAdapter(kind).json_schema(ref_template=_REFERENCES, mode=mode, schema_generator=_Schemas)
    components |= schema.pop("$defs", {})
    if "properties" in schema or ("title" in schema and schema.get("type") == "object"):
        name = str(schema["title"])
        components[name] = schema
        return {"$ref": _REFERENCES.format(model=name)}
    return schema


PREFIX: Final = "/api/v1"
_JSON: Final = "application/json"


def api_routes(services: Services, workers: Workers, *, now: Callable[[], datetime]) -> list[Route]:
    async def document(_request: Request) -> Response:
        return JSONResponse(openapi(ENDPOINTS, prefix=PREFIX))

    routes = [_route(each, services=services, workers=workers, now=now) for each in ENDPOINTS]
    return [Route(f"{PREFIX}/openapi.json", document), *routes]


def _route(endpoint: ApiEndpoint, *, services: Services, workers: Workers, now: Callable[[], datetime]) -> Route:
    async def answer(request: Request) -> Response:
        visit = Visit(request, request.state.admission, services, now())
        if not visit.visitor.role.includes(endpoint.role):
            raise Problem(403, f"The key or account of {visit.visitor.name} may only read.")
        return await workers.run(partial(_answer, endpoint, visit), account=visit.visitor.name)

    return Route(PREFIX + endpoint.path, answer, methods=[endpoint.method])


def _answer(endpoint: ApiEndpoint, visit: Visit) -> Response:
    asked = _parameters(endpoint.parameters, visit) if endpoint.method != "DELETE" else NoParameters()
    return JSONResponse(plain(endpoint.answer(visit, asked)))


def _parameters(model: type[BaseModel], visit: Visit) -> BaseModel:
    """Parse the parameters of a request; raises `Problem` if they are invalid."""
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
