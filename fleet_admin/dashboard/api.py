"""JSON API of the dashboard: the same data for programs, and an OpenAPI document generated from the endpoints."""

import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError, create_model
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fleet_admin.dashboard.endpoints import ENDPOINTS, ApiEndpoint
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.serving import Workers
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.dashboard.visit import Visit
from fleet_common.validation import plain_sentence
from schemas.names import VERSION


def to_json(value: object) -> object:
    """Convert to JSON: times as ISO 8601 in UTC, NaN and infinities as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, Mapping):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def model_of(view: type) -> type[BaseModel]:
    types = {field.name: typing.get_type_hints(view)[field.name] for field in fields(view)}
    for name in _names(view):
        if name not in types:
            types[name] = typing.get_type_hints(_property(view, name).fget)["return"]
    shaped: dict[str, Any] = {name: (type_of(each), ...) for name, each in types.items()}
    return create_model(view.__name__.removesuffix("View"), __doc__=_summary(view), **shaped)


def type_of(annotation: Any) -> Any:  # noqa: ANN401 - any annotation
    """Return an annotation's JSON type: views become their models."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return model_of(annotation)
    if annotation is float:
        return float | None  # what is no number becomes null
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        return list[type_of(arguments[0])]  # type: ignore[misc]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[str, type_of(arguments[1])]  # type: ignore[misc]
    if origin in (typing.Union, UnionType):
        members = tuple(NoneType if each is NoneType else type_of(each) for each in arguments)
        return typing.Union[members]  # noqa: UP007 - of a tuple
    return annotation


@cache
def _names(view: type) -> tuple[str, ...]:
    assert is_dataclass(view)
    names = [field.name for field in fields(view) if not field.name.startswith("_")]
    for kind in reversed(view.__mro__):
        names += [name for name, member in vars(kind).items() if isinstance(member, property) and name not in names]
    return tuple(names)


def _property(view: type, name: str) -> property:
    member = next(vars(kind)[name] for kind in view.__mro__ if name in vars(kind))
    assert isinstance(member, property)
    return member


def _summary(view: type) -> str:
    return (view.__doc__ or "").partition("\n")[0]


_REFERENCES: Final = "#/components/schemas/{model}"
_PROBLEMS: Final = {
    "400": "A parameter cannot be understood.",
    "401": "There is no key, or it is not taken.",
    "403": "The key may look, and not do this.",
    "404": "There is nothing of that name.",
    "409": "Several things begin so, or this dashboard is not set up for it.",
    "413": "The request is too large.",
    "415": "The body is no JSON.",
    "429": "Too much is under way for this account.",
    "503": "The database does not answer now.",
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
                "content": {
                    "application/json": {"schema": _schema(type_of(endpoint.result), components, "serialization")}
                },
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
    schema = TypeAdapter(kind).json_schema(ref_template=_REFERENCES, mode=mode)
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
            raise Problem(403, f"The key or account of {visit.visitor.name} may look, and not do this.")
        return await workers.run(partial(_answer, endpoint, visit), account=visit.visitor.name)

    return Route(PREFIX + endpoint.path, answer, methods=[endpoint.method])


def _answer(endpoint: ApiEndpoint, visit: Visit) -> Response:
    asked = _parameters(endpoint.parameters, visit) if endpoint.method != "DELETE" else None
    return JSONResponse(to_json(endpoint.answer(visit, asked)))


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
