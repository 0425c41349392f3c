"""CBOR schemas: binary messages as they lie on the wire, for the AsyncAPI document.

A JSON schema that is made of a message's class says what its fields mean. How they lie on the wire is said here, as far
as JSON schema has words for it: hot messages and forms of p are arrays with a field at each place, and a typed array of
numbers is a binary string, whose tags and items stand in `x-cbor-tags` and `x-cbor-items`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from schemas.cbor import FLOAT32, UINT16, UINT32
from schemas.downlink import FORMS

__all__ = ["on_the_wire"]

Schema = dict[str, Any]

_WIDTHS: Final = {UINT16: 2, UINT32: 4, FLOAT32: 4}
_LESS_ONE: Final = "counts"  # the one field whose items are not what they mean

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
    "description": "Fills the message up; neither it nor what stands behind it is read.",
}
_PROBABILITIES: Final = (
    "Probabilities, or their logarithms, as a typed array (RFC 8746): a byte string with tag 85, float32, "
    "little-endian."
)


def on_the_wire(
    schemas: Mapping[str, Schema], layouts: Mapping[str, Sequence[str]], *, optional: Mapping[str, Collection[str]]
) -> Schema:
    """Return the schemas of all messages as they lie on the wire.

    Args:
        schemas: By name, with fields as properties. Every array of numbers in them is a typed one on the wire.
        layouts: Fields of the messages that are arrays, in their order.
        optional: By message, those of them that need not be there; they come last, and bytes that only fill a message
            up may stand in their places.
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
    """Return the schema of a message that is an array. What stands behind its last place is a newer release's."""
    kept = {key: value for key, value in schema.items() if key in ("title", "description")}
    return kept | {"type": "array", "items": places, "minItems": least, "additionalItems": True}


def _field(schema: Schema, name: str) -> Schema:
    """Return the schema of the field at a place, where nothing is left out."""
    found: Schema = _typed(schema["properties"][name], name)
    return {key: value for key, value in found.items() if key != "default"} | {"title": name}


def _typed(value: Any, name: str) -> Any:  # noqa: ANN401 - JSON
    """Say of each array of numbers what it is on the wire; `name` is that of the field that it is in."""
    if isinstance(value, list):
        return [_typed(part, name) for part in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "array":
        return _typed_array(value, counts=name == _LESS_ONE)
    if "properties" in value:
        fields = {field: _typed(part, field) for field, part in value["properties"].items()}
        return value | {"properties": fields}
    # Forms of p are arrays, which no property tells apart: their numbers do.
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
