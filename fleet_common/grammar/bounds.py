"""Bounds of grammars: a cheap check and simplification before native code reads a grammar.

The bounds reject by name what would take seconds or overflow a stack. They guarantee nothing: a grammar that passes is
compiled in a process that may crash.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any, Final
from urllib.parse import unquote

from fleet_common.grammar.errors import GrammarError, unusable
from schemas.policy import Grammar, GrammarKind

_MOST_LEVELS: Final = 100
"""Nesting. Python's JSON parser gives up at about 1,000."""

_MOST_HOPS: Final = 250
"""Chain of references. A stack of 8 MiB overflows at about 1,200 of a schema, and at 2,000 rules or 3,800 terminals of
a Lark grammar."""

_MOST_DEFINITIONS: Final = 1000
"""Definitions of a schema, or rules and terminals of a Lark grammar."""

_MOST_PROPERTIES: Final = 2000
_MOST_LITERAL_BYTES: Final = 1 << 15
"""All constants together, as JSON."""

_MOST_PAIRS: Final = 4000
"""Pairs of alternatives of `oneOf` that are compared."""

FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Values of `format` that llguidance enforces. In JSON Schema all others are annotations, so they are removed."""

_MAPPINGS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES: Final = (
    "items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
"""Keywords of JSON Schema that contain schemas: by name, in a list, or one."""

_TYPES: Final = frozenset(("null", "boolean", "number", "string", "array", "object"))

_TOKEN: Final = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?://|\#)[^\n]*|%json\s*')
"""Parts of a Lark grammar with arbitrary content: strings, regular expressions, comments, and JSON schemas."""

_DEFINITION: Final = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)[^:\n|]*:", re.MULTILINE)
_NAME: Final = re.compile(r"[A-Za-z_]\w*")
_DECODER: Final = json.JSONDecoder()

Schema = dict[str, Any]


def bounded_text(grammar: Grammar) -> str:
    """Return the text of a grammar for the worker; raise GrammarError if it is invalid or too large.

    Unknown formats are removed, and `oneOf` becomes `anyOf` where possible.
    """
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            try:
                schema = json.loads(grammar.text)
            except RecursionError:
                raise _too_many("levels of nesting", _MOST_LEVELS) from None
            except ValueError as error:
                raise unusable(f"the schema is not JSON: {error}") from None
            return _schema_text(schema)
        case GrammarKind.LARK:
            return _lark_text(grammar.text)
        case _:
            return grammar.text


def _schema_text(schema: object) -> str:
    if not isinstance(schema, dict | bool):
        raise unusable("a JSON schema is an object")
    _check_levels(schema)
    if isinstance(schema, dict):
        subschemas = list(_subschemas(schema))
        _check_numbers(subschemas)
        _check_hops(schema)
        _simplify(schema, subschemas)
    return _json(schema)


def _lark_text(text: str) -> str:
    """Check a Lark grammar and the schemas in it; return it with the schemas simplified."""
    given, bare, place = list[str](), list[str](), 0
    for found in _TOKEN.finditer(text):
        if found.start() < place:
            continue  # in a schema
        bare.append(text[place : found.start()])
        given.append(text[place : found.end()])
        place = found.end()
        if found[0].startswith("%json"):
            try:
                schema, end = _DECODER.raw_decode(text, place)
            except (ValueError, RecursionError):
                continue  # llguidance reports the error
            given.append(_schema_text(schema))
            place = end
    _check_rules("".join([*bare, text[place:]]))
    return "".join([*given, text[place:]])


def _check_levels(schema: object) -> None:
    level: list[object] = [schema]
    for _ in range(_MOST_LEVELS):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = list(itertools.chain.from_iterable(inner))
        if not level:
            return
    raise _too_many("levels of nesting", _MOST_LEVELS)


def _check_numbers(subschemas: Iterable[Schema]) -> None:
    properties = definitions = literals = 0
    for schema in subschemas:
        properties += len(_mapping(schema, "properties")) + len(_mapping(schema, "patternProperties"))
        definitions += len(_mapping(schema, "$defs")) + len(_mapping(schema, "definitions"))
        literals += sum(
            len(_json(schema[word]).encode("utf-8", "replace")) for word in ("const", "enum") if word in schema
        )
    for what, number, most in (
        ("properties", properties, _MOST_PROPERTIES),
        ("definitions", definitions, _MOST_DEFINITIONS),
        ("bytes of constants", literals, _MOST_LITERAL_BYTES),
    ):
        if number > most:
            raise _too_many(what, most)


def _check_hops(root: Schema) -> None:
    """Limit chains of references between definitions, followed like a compiler does: in order, each once."""
    seen = set[str]()
    waiting: list[tuple[Schema, int]] = [(root, 0)]
    while waiting:
        schema, hops = waiting.pop()
        reference = schema.get("$ref")
        inner = [(each, hops) for each in _direct(schema, definitions=False)]
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            if hops == _MOST_HOPS:
                raise _too_many("references in a row", _MOST_HOPS)
            if isinstance(target := _target(root, reference), dict):
                inner.append((target, hops + 1))
        waiting.extend(reversed(inner))


def _check_rules(bare: str) -> None:
    """Limit the rules and terminals of a Lark grammar (without its literals), and their chains of references."""
    places = list(_DEFINITION.finditer(bare))
    if len(places) > _MOST_DEFINITIONS:
        raise _too_many("rules and terminals", _MOST_DEFINITIONS)
    ends = [place.start() for place in places[1:]] + [len(bare)]
    uses = {place[1]: _NAME.findall(bare, place.end(), end) for place, end in zip(places, ends, strict=False)}
    seen = set[str]()
    waiting = [(name, 0) for name in reversed(uses)]
    if "start" in uses:
        waiting.append(("start", 0))
    while waiting:
        name, hops = waiting.pop()
        if name in seen or name not in uses:
            continue
        seen.add(name)
        if hops == _MOST_HOPS:
            raise _too_many("rules or terminals that lead from one to the next", _MOST_HOPS)
        waiting.extend((used, hops + 1) for used in reversed(uses[name]))


def _simplify(root: Schema, subschemas: Iterable[Schema]) -> None:
    """Remove unknown formats, and replace `oneOf` by `anyOf` where no value can match two alternatives."""
    pairs = 0
    for schema in subschemas:
        if isinstance(form := schema.get("format"), str) and form not in FORMATS:
            del schema["format"]
        alternatives = schema.get("oneOf")
        if isinstance(alternatives, list) and "anyOf" not in schema:
            pairs += len(alternatives) ** 2 // 2
            if pairs <= _MOST_PAIRS and all(_disjoint(*pair, root) for pair in combinations(alternatives, 2)):
                schema["anyOf"] = schema.pop("oneOf")


def _disjoint(one: object, other: object, root: Schema, levels: int = 4) -> bool:
    """Whether it is certain that no value matches both schemas.

    Some of their requirements are enough to know: a value that matches a schema matches each part of it.
    """
    one, other = _resolved(one, root), _resolved(other, root)
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict) or levels == 0:
        return False
    if not _types(one) & _types(other):
        return True
    values, others = _scalars(one), _scalars(other)
    if values is not None and others is not None and not values & others:
        return True
    if _types(one) | _types(other) != {"object"}:
        return False
    properties, others_properties = _mapping(one, "properties"), _mapping(other, "properties")
    # One of them requires the property, so a value that matches both has it.
    return any(
        _disjoint(properties[key], others_properties[key], root, levels - 1)
        for key in {*_names(one.get("required")), *_names(other.get("required"))}
        if key in properties and key in others_properties
    )


def _resolved(schema: object, root: Schema) -> object:
    """Follow up to four references within a schema."""
    for _ in range(4):
        if not isinstance(schema, dict) or not isinstance(reference := schema.get("$ref"), str):
            return schema
        schema = _target(root, reference)
    return schema


def _types(schema: Schema) -> frozenset[str]:
    """Return the types that a schema allows; an integer is a number."""
    named = schema.get("type")
    names = {named} if isinstance(named, str) else set(_names(named))
    types = frozenset("number" if name == "integer" else name for name in names) & _TYPES or _TYPES
    values = _scalars(schema)
    return types if values is None else types & {kind for kind, _ in values}


def _scalars(schema: Schema) -> frozenset[tuple[str, object]] | None:
    """Return the values of a schema that only allows some scalars, with their types; None for other schemas."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, dict | list) for value in values):
        return None
    return frozenset((_type(value), value) for value in values)


def _type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case _:
            return "number"


def _subschemas(root: Schema) -> Iterator[Schema]:
    waiting = [root]
    while waiting:
        schema = waiting.pop()
        yield schema
        waiting.extend(_direct(schema))


def _direct(schema: Schema, *, definitions: bool = True) -> Iterator[Schema]:
    for word, value in schema.items():
        found: Iterable[object] = ()
        if word in _MAPPINGS and isinstance(value, dict):
            found = value.values() if definitions or word not in ("$defs", "definitions") else ()
        elif word in _LISTS and isinstance(value, list):
            found = value
        elif word in _SINGLES:
            found = (value,)
        yield from (each for each in found if isinstance(each, dict))


def _target(root: Schema, reference: str) -> object:
    """Return the target of a reference within a schema; None if there is none."""
    if not reference.startswith("#"):
        return None
    found: object = root
    for part in unquote(reference[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict):
            found = found.get(name)
        else:
            return None
    return found


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _mapping(schema: Schema, word: str) -> Mapping[str, object]:
    found = schema.get(word)
    return found if isinstance(found, dict) else {}


def _names(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _too_many(what: str, most: int) -> GrammarError:
    return unusable(f"it has more than {most} {what}; make it smaller")
