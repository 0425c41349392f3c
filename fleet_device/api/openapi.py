"""OpenAPI document of the local API, from the models that validate its requests."""

from functools import cache
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from fleet_device.api.ollama import MEDIA_TYPE, OllamaChatRequest, OllamaGenerateRequest
from fleet_device.api.problems import OLLAMA
from fleet_device.api.requests import (
    LABELS,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
)
from fleet_device.api.responses import ResponsesRequest
from schemas.names import VERSION

_Schema = dict[str, Any]

_REFERENCES: Final = "#/components/schemas/{model}"
_JSON: Final = "application/json"
_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "integer", "minimum": 0}
_ANY: Final[_Schema] = {}


def _object(**properties: _Schema) -> _Schema:
    """Return the schema of an object that has these fields, and maybe others."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: _Schema, **bounds: int) -> _Schema:
    return {"type": "array", "items": items, **bounds}


def _maybe(schema: _Schema) -> _Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_COMMON: Final = {
    "model": _TEXT,
    "fleet": _object(session=_TEXT, seed=_NUMBER, mode=_TEXT, verified={"type": "boolean"}),
}
_USAGE: Final = _object(prompt_tokens=_NUMBER, completion_tokens=_NUMBER, total_tokens=_NUMBER)


def _answer(kind: str, **content: _Schema) -> _Schema:
    choice = _object(
        index=_NUMBER,
        **content,
        logprobs=_maybe({"type": "object"}),
        finish_reason={"enum": ["stop", "length", "tool_calls"]},
    )
    head: dict[str, _Schema] = {"id": _TEXT, "object": {"const": kind}, "created": _NUMBER}
    return _object(**head, choices=_list(choice, minItems=1), usage=_USAGE, **_COMMON)


_MODEL: Final = _object(id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT)
_RESPONSE: Final = _object(
    id=_TEXT,
    object={"const": "response"},
    created_at=_NUMBER,
    status={"enum": ["completed", "incomplete"]},
    output=_list(_object(type={"enum": ["message", "function_call"]}, id=_TEXT, status=_TEXT), minItems=1),
    usage=_object(input_tokens=_NUMBER, output_tokens=_NUMBER, total_tokens=_NUMBER),
    **_COMMON,
)
_MESSAGE: Final = _object(role={"const": "assistant"}, content=_maybe(_TEXT), refusal={"type": "null"})
_TOKENS: Final = _object(count=_NUMBER, max_model_len=_NUMBER, tokens=_list(_NUMBER), token_strs=_maybe(_list(_TEXT)))
_HEALTH: Final = _object(status=_TEXT, reason=_maybe(_TEXT))
_EVENT: Final = _object(data=_TEXT)
_ERROR: Final = _object(error=_object(message=_TEXT, type=_TEXT, param=_maybe(_TEXT), code=_maybe(_TEXT)))
_OLLAMA_HEAD: Final = {"model": _TEXT, "created_at": _TEXT, "done": {"type": "boolean"}}
_OLLAMA_MESSAGE: Final = _object(role={"const": "assistant"}, content=_TEXT)
_OLLAMA_MODEL: Final = _object(name=_TEXT, model=_TEXT, modified_at=_TEXT, size=_NUMBER, digest=_TEXT)


class DeviceEndpoint(NamedTuple):
    """An endpoint; `request` is the model of a POST's body, and `streams` says whether it has server-sent events."""

    path: str
    summary: str
    answer: _Schema
    request: type[BaseModel] | None = None
    streams: bool = False


ENDPOINTS: Final = (
    DeviceEndpoint(
        "/v1/chat/completions",
        "Answer a chat.",
        _answer("chat.completion", message=_MESSAGE),
        ChatRequest,
        streams=True,
    ),
    DeviceEndpoint(
        "/v1/completions", "Continue a prompt.", _answer("text_completion", text=_TEXT), CompletionRequest, streams=True
    ),
    DeviceEndpoint("/v1/responses", "Answer text, or call a function.", _RESPONSE, ResponsesRequest, streams=True),
    DeviceEndpoint("/tokenize", "Return the tokens of a text or chat.", _TOKENS, TokenizeRequest),
    DeviceEndpoint(
        "/v1/models", "List the models of the edges.", _object(object={"const": "list"}, data=_list(_MODEL))
    ),
    DeviceEndpoint("/v1/models/{name}", "Describe a model.", _MODEL),
    DeviceEndpoint("/healthz", "Say whether the device can generate.", _HEALTH),
    DeviceEndpoint("/health", "Say whether the device can generate.", _HEALTH),
    DeviceEndpoint("/version", "Return the version.", _object(version=_TEXT)),
    DeviceEndpoint("/status", "Describe the device.", {"type": "object"}),
    DeviceEndpoint(
        "/api/chat",
        "Answer a chat, as Ollama does.",
        _object(**_OLLAMA_HEAD, message=_OLLAMA_MESSAGE),
        OllamaChatRequest,
        streams=True,
    ),
    DeviceEndpoint(
        "/api/generate",
        "Answer a prompt, as Ollama does.",
        _object(**_OLLAMA_HEAD, response=_TEXT),
        OllamaGenerateRequest,
        streams=True,
    ),
    DeviceEndpoint("/api/tags", "List the models of the edges, as Ollama does.", _object(models=_list(_OLLAMA_MODEL))),
    DeviceEndpoint("/api/version", "Return the version.", _object(version=_TEXT)),
)

_PROBLEMS: Final = {
    400: "A parameter cannot be used.",
    401: "The device requires a token.",
    404: "There is nothing of that name.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    421: "The request names another host.",
    429: "Too many requests, or over a quota.",
    502: "The session failed.",
    503: "No edge, no broker, or the device shuts down.",
}


@cache
def openapi() -> _Schema:
    components: _Schema = {"Error": _ERROR, "OllamaError": _object(error=_TEXT)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Device", "version": VERSION, "description": "OpenAI's API on a device."},
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": {
            each.path: {"get" if each.request is None else "post": _operation(each, components)} for each in ENDPOINTS
        },
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(endpoint: DeviceEndpoint, components: _Schema) -> _Schema:
    content: _Schema = {_JSON: {"schema": endpoint.answer}}
    ollama = endpoint.path.startswith(OLLAMA)
    if endpoint.streams:
        content |= {MEDIA_TYPE: {"schema": endpoint.answer}} if ollama else {"text/event-stream": {"schema": _EVENT}}
    error = {_JSON: {"schema": {"$ref": _REFERENCES.format(model="OllamaError" if ollama else "Error")}}}
    operation: _Schema = {
        "summary": endpoint.summary,
        "responses": {
            "200": {"description": endpoint.summary, "content": content},
            **{str(status): {"description": words, "content": error} for status, words in _PROBLEMS.items()},
        },
    }
    if endpoint.answer is _HEALTH:
        operation["responses"]["503"]["content"] = content
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
    neutral = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    schema["properties"] = {**dict.fromkeys(sorted(LABELS), _ANY), **neutral, **schema["properties"]}
    if issubclass(model, GenerationRequest) and model.needs_model:
        schema["properties"]["model"] = {"type": "string", "minLength": 1}
        schema["required"].append("model")
    components[model.__name__] = schema
    return {"$ref": _REFERENCES.format(model=model.__name__)}
