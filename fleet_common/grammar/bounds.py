"""Bounds of grammars: a cheap check and rewriting before native code reads a grammar.

The bounds reject by name what would take seconds or overflow a stack. They guarantee nothing: a grammar that passes is
compiled in a process that may crash.
"""

import itertools
import json
import re
from collections.abc import Iterable
from typing import Final

from fleet_common.grammar.errors import GrammarError, unusable
from fleet_common.grammar.rewriting import Rewriter, Schema, direct, mapping, subschemas, target_of
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

_TOKEN: Final = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?://|\#)[^\n]*|%json\s*')
"""Parts of a Lark grammar with arbitrary content: strings, regular expressions, comments, and JSON schemas."""

_DEFINITION: Final = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)[^:\n|]*:", re.MULTILINE)
_NAME: Final = re.compile(r"[A-Za-z_]\w*")
_DECODER: Final = json.JSONDecoder()


def bounded_text(grammar: Grammar) -> str:
    """Return the text of a grammar for the worker; raise GrammarError if it is invalid or too large.

    Keywords that llguidance does not support are rewritten where possible.
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
        found = list(subschemas(schema))
        _check_numbers(found)
        _check_hops(schema)
        rewriter = Rewriter(schema)
        for each in reversed(found):
            rewriter.rewrite(each)
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


def _check_numbers(schemas: Iterable[Schema]) -> None:
    properties = definitions = literals = 0
    for schema in schemas:
        properties += len(mapping(schema, "properties")) + len(mapping(schema, "patternProperties"))
        definitions += len(mapping(schema, "$defs")) + len(mapping(schema, "definitions"))
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
        inner = [(each, hops) for each in direct(schema, definitions=False)]
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            if hops == _MOST_HOPS:
                raise _too_many("references in a row", _MOST_HOPS)
            if isinstance(target := target_of(root, reference), dict):
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


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _too_many(what: str, most: int) -> GrammarError:
    return unusable(f"it has more than {most} {what}; make it smaller")
