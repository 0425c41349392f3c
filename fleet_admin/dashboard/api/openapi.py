"""OpenAPI 3.1 document of the API, made of the endpoints that serve it."""

from collections.abc import Iterable
from typing import Any, Final

from pydantic import TypeAdapter

from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.api.endpoint import Endpoint
from fleet_admin.dashboard.api.values import type_of
from schemas.names import VERSION

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


def openapi(endpoints: Iterable[Endpoint], *, prefix: str) -> dict[str, Any]:
    """Return the document.

    Args:
        endpoints: What is served.
        prefix: Of their paths.
    """
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


def _operation(endpoint: Endpoint, components: dict[str, Any]) -> dict[str, Any]:
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
    if endpoint.role is Role.OPERATOR:
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
