"""OpenAPI document of the local API, for schemathesis: requests by the models that validate them, and errors."""

from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from fleet_device.api.ollama import MEDIA_TYPE, OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest
from fleet_device.api.problems import OLLAMA
from fleet_device.api.requests import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
)
from fleet_device.api.responses import ResponsesRequest

_Schema = dict[str, Any]

_REFERENCES: Final = "#/components/schemas/{model}"
_JSON: Final = "application/json"
_TEXT: Final = {"type": "string"}
_ANY: Final[_Schema] = {}
_OBJECT: Final = {"type": "object"}


def _object(**properties: _Schema) -> _Schema:
    """Return the schema of an object that has these fields, and maybe others."""
    return {"type": "object", "properties": properties, "required": list(properties)}


_MAYBE: Final = {"anyOf": [_TEXT, {"type": "null"}]}
_ERROR: Final = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE))


class DeviceEndpoint(NamedTuple):
    """An endpoint; `request` is the model of a POST's body, and `streams` says whether it has server-sent events."""

    path: str
    request: type[BaseModel] | None = None
    streams: bool = False


ENDPOINTS: Final = (
    DeviceEndpoint("/v1/chat/completions", ChatRequest, streams=True),
    DeviceEndpoint("/v1/completions", CompletionRequest, streams=True),
    DeviceEndpoint("/v1/responses", ResponsesRequest, streams=True),
    DeviceEndpoint("/tokenize", TokenizeRequest),
    DeviceEndpoint("/v1/models"),
    DeviceEndpoint("/v1/models/{name}"),
    DeviceEndpoint("/healthz"),
    DeviceEndpoint("/status"),
    DeviceEndpoint("/api/chat", OllamaChatRequest, streams=True),
    DeviceEndpoint("/api/generate", OllamaGenerateRequest, streams=True),
    DeviceEndpoint("/api/show", OllamaShowRequest),
    DeviceEndpoint("/api/tags"),
    DeviceEndpoint("/api/ps"),
    DeviceEndpoint("/api/version"),
)
_PROBLEMS: Final = (400, 404, 413, 415, 429, 502, 503)


def document() -> _Schema:
    components: _Schema = {"Error": _ERROR, "OllamaError": _object(error=_TEXT)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Device", "version": "1"},
        "servers": [{"url": "/"}],
        "paths": {
            each.path: {"get" if each.request is None else "post": _operation(each, components)} for each in ENDPOINTS
        },
        "components": {"schemas": components},
    }


def _operation(endpoint: DeviceEndpoint, components: _Schema) -> _Schema:
    ollama = endpoint.path.startswith(OLLAMA)
    content: _Schema = {_JSON: {"schema": _OBJECT}}
    if endpoint.streams:
        content |= (
            {MEDIA_TYPE: {"schema": _OBJECT}} if ollama else {"text/event-stream": {"schema": _object(data=_TEXT)}}
        )
    error = {_JSON: {"schema": {"$ref": _REFERENCES.format(model="OllamaError" if ollama else "Error")}}}
    responses = {str(status): {"description": "", "content": error} for status in _PROBLEMS}
    operation: _Schema = {"responses": {"200": {"description": "", "content": content}, **responses}}
    if endpoint.request is not None:
        schema = _request(endpoint.request, components)
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    if "{name}" in endpoint.path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT | {"minLength": 1}}]
    return operation


def _request(model: type[BaseModel], components: _Schema) -> _Schema:
    """Add the schema of a request's body, with the fields that are accepted only with certain values."""
    schema = model.model_json_schema(ref_template=_REFERENCES)
    components |= schema.pop("$defs", {})
    if message := components.get("RequestMessage"):  # results need their calls: almost all would be refused
        message["properties"] |= {"tool_calls": {"enum": [None]}, "tool_call_id": {"enum": [None]}}
        message["properties"]["role"] = {"enum": ["system", "developer", "user", "assistant"]}
    neutral = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    schema["properties"] = {"user": _ANY, **neutral, **schema["properties"]}
    if issubclass(model, GenerationRequest):
        schema["properties"]["stream_options"] = {"enum": [None]}  # others need `stream`: almost all would be refused
    if issubclass(model, GenerationRequest) and model.needs_model:
        schema["properties"]["model"] = {"type": "string", "minLength": 1}
        schema["required"].append("model")
    components[model.__name__] = schema
    return {"$ref": _REFERENCES.format(model=model.__name__)}
