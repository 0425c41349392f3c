"""AsyncAPI 3 document of all topics and messages, generated from the definitions that both ends use.

https://www.asyncapi.com/docs/reference/specification/v3.0.0: a channel is a topic, an operation is a role that sends or
receives on it, a message has a JSON schema. The schemas of binary messages describe their wire format.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from schemas import codec
from schemas.cbor import FLOAT32, UINT16, UINT32
from schemas.control import (
    MAX_CONTROL_BYTES,
    Alert,
    CommandRequest,
    CommandResponse,
    DesiredSettings,
    DeviceState,
    EdgeState,
    ReportedSettings,
    Telemetry,
)
from schemas.downlink import FORMS
from schemas.fields import EdgeLoad, Logprobs
from schemas.messages import PROTOCOL, Close, Closed, Draft, Fault, Open, Opened, Refused, Verdict
from schemas.topics import ROOT, TREE, ClientRole, Topic, TopicRule

Schema = dict[str, Any]

_WIDTHS: Final = {UINT16: 2, UINT32: 4, FLOAT32: 4}
_LESS_ONE: Final = "counts"  # the only field whose items are stored minus one

_IDS: Final = (
    "Token ids as a typed array (RFC 8746): a byte string with tag 69, 16 bits an id, or 70, 32 bits where an id needs "
    "them; little-endian."
)
_COUNTS: Final = (
    "Counts as a typed array (RFC 8746): a byte string with tag 69, 16 bits a count, little-endian; each less one."
)
_FILLING: Final = {
    "type": "string",
    "format": "binary",
    "description": "Padding; it and everything after it is ignored.",
}
_PROBABILITIES: Final = (
    "Probabilities, or their logarithms, as a typed array (RFC 8746): a byte string with tag 85, float32, "
    "little-endian."
)


def on_the_wire(
    schemas: Mapping[str, Schema], layouts: Mapping[str, Sequence[str]], *, optional: Mapping[str, Collection[str]]
) -> Schema:
    """Return the schemas of all messages in their wire format.

    Every array of numbers becomes a typed one. `layouts` are the fields of the messages that are arrays, in order;
    `optional` fields come last, and padding may replace them.
    """
    forms = {form.__name__: form for form in FORMS}
    wire: Schema = {}
    for name, schema in schemas.items():
        if name in forms:
            number = {"const": forms[name].number, "title": "number"}
            fields = [_field(schema, field) for field in forms[name].wire]
            wire[name] = _array(schema, [number, *fields], least=1 + len(fields))
        elif name in layouts:
            free = optional.get(name, ())
            fields = [
                {"anyOf": [_field(schema, field), _FILLING], "title": field} if field in free else _field(schema, field)
                for field in layouts[name]
            ]
            wire[name] = _array(schema, fields, least=len(fields) - len(free))
        else:
            wire[name] = _typed(schema, name)
    return wire


def _array(schema: Schema, places: list[Schema], *, least: int) -> Schema:
    """Return the schema of an array message. Items after the last position are of a newer release."""
    kept = {key: value for key, value in schema.items() if key in ("title", "description")}
    return kept | {"type": "array", "items": places, "minItems": least, "additionalItems": True}


def _field(schema: Schema, name: str) -> Schema:
    """Return the schema of a field at a position, without default."""
    found: Schema = _typed(schema["properties"][name], name)
    return {key: value for key, value in found.items() if key != "default"} | {"title": name}


def _typed(value: Any, name: str) -> Any:  # noqa: ANN401 - JSON
    """Describe the wire format of each array of numbers; `name` is the field that contains it."""
    if isinstance(value, list):
        return [_typed(part, name) for part in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "array":
        return _typed_array(value, counts=name == _LESS_ONE)
    if "properties" in value:
        fields = {field: _typed(part, field) for field, part in value["properties"].items()}
        return value | {"properties": fields}
    # Forms of p are arrays, distinguished by their numbers rather than by a property.
    return {key: _typed(part, name) for key, part in value.items() if key != "discriminator"}


def _typed_array(array: Schema, *, counts: bool) -> Schema:
    items = dict(array["items"])
    if items["type"] == "number":
        tags, words = [FLOAT32], _PROBABILITIES
    elif counts:
        tags, words = [UINT16], _COUNTS
        items |= {"minimum": items["minimum"] - 1, "maximum": items["maximum"] - 1}
    else:
        tags, words = [UINT16, UINT32], _IDS
    typed = {"type": "string", "format": "binary", "description": words, "x-cbor-tags": tags, "x-cbor-items": items}
    if "title" in array:
        typed["title"] = array["title"]
    if "maxItems" in array:
        typed["maxLength"] = array["maxItems"] * max(_WIDTHS[tag] for tag in tags)
    if "minItems" in array:
        typed["minLength"] = array["minItems"] * min(_WIDTHS[tag] for tag in tags)
    return typed


MESSAGES: Final[Mapping[Topic, Sequence[type[BaseModel]]]] = {
    Topic.STATE: (DeviceState,),
    Topic.OPEN: (Open,),
    Topic.DRAFT: (Draft,),
    Topic.CLOSE: (Close,),
    Topic.TELEMETRY: (Telemetry,),
    Topic.SESSION: (Opened, Refused, Closed, Fault),
    Topic.VERDICT: (Verdict,),
    Topic.CONFIG_DESIRED: (DesiredSettings,),
    Topic.CONFIG_REPORTED: (ReportedSettings,),
    Topic.COMMAND_REQUEST: (CommandRequest,),
    Topic.COMMAND_RESPONSE: (CommandResponse,),
    Topic.EDGE_STATE: (EdgeState,),
    Topic.ALERT: (Alert,),
}
"""Which messages a topic carries."""

_LAYOUTS: Final[Mapping[type[BaseModel], Sequence[str]]] = {Draft: codec.DRAFT_LAYOUT, Verdict: codec.VERDICT_LAYOUT}
_OPTIONAL: Final[Mapping[str, Sequence[str]]] = {
    "Draft": codec.DRAFT_LAYOUT[codec.DRAFT_FIELDS :],
    "Verdict": codec.VERDICT_LAYOUT[codec.VERDICT_FIELDS :],
}
"""Fields of arrays that need not be there."""

_BOUNDS: Final[Mapping[type[BaseModel], int]] = {
    Open: codec.MAX_OPEN_BYTES,
    Draft: codec.MAX_DRAFT_BYTES,
    Close: codec.MAX_CLOSE_BYTES,
    Verdict: codec.MAX_VERDICT_BYTES,
    **dict.fromkeys((Opened, Refused, Closed, Fault), codec.MAX_REPLY_BYTES),
    **dict.fromkeys((DeviceState, EdgeState, Telemetry, Alert), MAX_CONTROL_BYTES),
    **dict.fromkeys((DesiredSettings, ReportedSettings, CommandRequest, CommandResponse), MAX_CONTROL_BYTES),
}

_CBOR: Final = (
    "CBOR (RFC 8949) with definite lengths. Token ids are a little-endian typed array (RFC 8746: tag 69, 16 bits; tag "
    "70, 32 bits where an id needs them), probabilities one of float32 (tag 85), draft counts one of 16 bits that "
    "holds each count less one."
)
_NEXT: Final = (
    "`next` is null, a token id, or a form of the target distribution as an array: "
    + ", ".join(f"{form.described} for {form.model_fields['kind'].default}" for form in FORMS)
    + "."
)


def document() -> dict[str, Any]:
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Distributed split speculative decoding over MQTT",
            "version": str(PROTOCOL),
            "description": "Devices draft, an edge verifies. MQTT 5; the access rules follow from the same table.",
            "license": {"name": "Apache-2.0"},
        },
        "servers": {
            "production": {
                "host": "broker.example:8883",
                "protocol": "secure-mqtt",
                "protocolVersion": "5.0",
                "description": "Mutual TLS; the certificate's common name is the user and the client id.",
                "security": [{"type": "X509", "description": "A certificate of the fleet's own authority."}],
            }
        },
        "channels": {_channel_id(rule.topic): _channel(rule) for rule in TREE},
        "operations": {
            _operation_id(role, action, rule.topic): _operation(role, action, rule)
            for rule in TREE
            for role, action in _parts(rule)
        },
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _channel(rule: TopicRule) -> dict[str, Any]:
    levels = [name for name in ("fleet", "device", "edge") if "{" + name + "}" in "{fleet}/" + rule.template]
    meaning = {"fleet": "The fleet's name.", "device": "The device's name.", "edge": "The edge's name."}
    names = [model.__name__ for model in MESSAGES[rule.topic]]
    return {
        "address": f"{ROOT}/{{fleet}}/{rule.template}",
        "parameters": {name: {"description": meaning[name]} for name in levels},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
    }


def _parts(rule: TopicRule) -> list[tuple[ClientRole, str]]:
    sends = [(role, "send") for role in ClientRole if role in rule.writers]
    return sends + [(role, "receive") for role in ClientRole if role in rule.readers]


def _operation(role: ClientRole, action: str, rule: TopicRule) -> dict[str, Any]:
    binding: dict[str, Any] = {"qos": rule.qos, "retain": rule.retained}
    if rule.expiry_s is not None:
        binding["messageExpiryInterval"] = rule.expiry_s
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{_channel_id(rule.topic)}"},
        "tags": [{"name": role.value}],
        "bindings": {"mqtt": {**binding, "bindingVersion": "0.2.0"}},
    }


def _messages() -> dict[str, Any]:
    return {model.__name__: _message(model, binary=rule.binary) for rule in TREE for model in MESSAGES[rule.topic]}


def _message(model: type[BaseModel], *, binary: bool) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": model.__name__,
        "summary": (model.__doc__ or "").partition("\n")[0],
        "contentType": "application/cbor" if binary else "application/json",
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
        "x-max-bytes": _BOUNDS[model],
    }
    layout = _LAYOUTS.get(model)
    if layout is not None:
        more = f" {_NEXT}" if "next" in layout else ""
        message["description"] = f"{_CBOR} An array, by position, of what the schema names.{more}"
        message["x-cbor-array"] = list(layout)
    elif binary:
        message["description"] = f"{_CBOR} A map with the schema's names as text keys."
    return message


def _schemas() -> dict[str, Any]:
    models = [model for known in MESSAGES.values() for model in known]
    _, schema = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    layouts = {model.__name__: layout for model, layout in _LAYOUTS.items()} | {
        "Logprobs": tuple(Logprobs.model_fields),
        "EdgeLoad": tuple(EdgeLoad.model_fields),
    }
    return on_the_wire(schema["$defs"], layouts, optional=_OPTIONAL)


def _channel_id(topic: Topic) -> str:
    return "edgeState" if topic is Topic.EDGE_STATE else _camel(topic.value)


def _operation_id(role: ClientRole, action: str, topic: Topic) -> str:
    channel = _channel_id(topic)
    return f"{role.value}{action.capitalize()}s{channel[0].upper()}{channel[1:]}"


def _camel(topic: str) -> str:
    first, *rest = topic.split("/")
    return first + "".join(level.capitalize() for level in rest)
