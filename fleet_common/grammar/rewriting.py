"""Rewrite keywords of a JSON schema that llguidance does not support into others that allow exactly the same values.

`oneOf`, `not`, `if` and `dependencies` need negations. A negation exists here for types, scalar constants, required
properties and combinations of them. Where there is none, the keyword stays, and llguidance refuses it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, Final
from urllib.parse import unquote

Schema = dict[str, Any]

FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Values of `format` that llguidance enforces. In JSON Schema all others are annotations, so they are removed."""

_MOST_COMPARED: Final = 4000
"""Pairs of schemas of a grammar that are compared: alternatives of `oneOf` and their parts."""

_MOST_NEGATED: Final = 64
"""Negated schemas of a grammar. Each may multiply the work of llguidance, which has its own limit."""

_MOST_LISTED: Final = 32
"""Properties of which one must exist (`minProperties: 1`)."""

_MOST_DEPENDENCIES: Final = 6
"""Dependencies of a schema. Each doubles the combinations that llguidance makes of it."""

_MOST_LETTERS: Final = 400
_LONGEST: Final = 60
"""Letters of the strings that a pattern excludes, together and of each. Rust's regular expressions nest 250 times."""

_LEVELS: Final = 4
_MAPPINGS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES: Final = (
    "items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
"""Keywords of JSON Schema that contain schemas: by name, in a list, or one."""

_ANNOTATIONS: Final = frozenset(
    ("title", "description", "$comment", "default", "example", "examples", "deprecated", "readOnly", "writeOnly")
)
_DEPENDENCIES: Final = ("dependencies", "dependentRequired", "dependentSchemas")
_KINDS: Final = {
    "object": {
        "properties", "patternProperties", "additionalProperties", "required", "propertyNames", "minProperties",
        "maxProperties", *_DEPENDENCIES,
    },
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains"},
    "string": {"minLength", "maxLength", "pattern"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set[str](),
    "null": set[str](),
}  # fmt: skip
"""Keywords that restrict only values of one type."""

_TYPES: Final = frozenset(_KINDS)


def subschemas(root: Schema) -> Iterator[Schema]:
    """Return a schema, all in it, and what they refer to elsewhere in it; each before those that it contains."""
    waiting, seen = [root], {id(root)}
    while waiting:
        schema = waiting.pop()
        yield schema
        found = [*direct(schema)]
        if isinstance(reference := schema.get("$ref"), str) and isinstance(target := target_of(root, reference), dict):
            found.insert(0, target)
        waiting.extend(each for each in found if id(each) not in seen)
        seen.update(map(id, found))


def direct(schema: Schema, *, definitions: bool = True) -> Iterator[Schema]:
    for word, value in schema.items():
        found: Iterable[object] = ()
        if word in _MAPPINGS and isinstance(value, dict):
            found = value.values() if definitions or word not in ("$defs", "definitions") else ()
        elif word in _LISTS and isinstance(value, list):
            found = value
        elif word in _SINGLES:
            found = (value,)
        yield from (each for each in found if isinstance(each, dict))


def target_of(root: Schema, reference: str) -> object:
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


def mapping(schema: Schema, word: str) -> Mapping[str, Any]:
    found = schema.get(word)
    return found if isinstance(found, dict) else {}


class Rewriter:
    """Rewrites the schemas in a root schema, in place; `left` and `negations` bound the work."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._left = _MOST_COMPARED
        self._negations = _MOST_NEGATED

    def rewrite(self, schema: Schema) -> None:
        """Rewrite one schema, after those that it contains."""
        if isinstance(form := schema.get("format"), str) and form not in FORMATS:
            del schema["format"]
        if schema.get("uniqueItems") is False or _at_most_one(schema.get("maxItems")):
            schema.pop("uniqueItems", None)
        conjuncts = [*self._if(schema), *self._not(schema), *self._dependencies(schema), *_least_one(schema)]
        if conjuncts:
            schema["allOf"] = [*_listed(schema, "allOf"), *conjuncts]
        self._one_of(schema)

    def _if(self, schema: Schema) -> Iterator[object]:
        if "if" not in schema or not {"then", "else"} & schema.keys():
            for word in ("if", "then", "else"):
                schema.pop(word, None)
            return
        if (negated := self.negated(schema["if"])) is not None:
            condition, then, otherwise = schema.pop("if"), schema.pop("then", True), schema.pop("else", True)
            yield {"anyOf": [{"allOf": [condition, then]}, {"allOf": [negated, otherwise]}]}

    def _not(self, schema: Schema) -> Iterator[object]:
        if "not" in schema and (negated := self.negated(schema["not"])) is not None:
            del schema["not"]
            yield negated

    def _dependencies(self, schema: Schema) -> Iterator[object]:
        found = {word: mapping(schema, word) for word in _DEPENDENCIES}
        if sum(map(len, found.values())) > _MOST_DEPENDENCIES:
            return
        for word, dependencies in found.items():
            schema.pop(word, None)
            for key, needed in dependencies.items():
                names = [needed] if isinstance(needed, str) else needed
                behind: Schema = {"required": [key, *names]} if isinstance(names, list) else {"required": [key]}
                if not isinstance(names, list):
                    behind["allOf"] = [needed]
                yield {"anyOf": [{"properties": {key: False}}, behind]}

    def _one_of(self, schema: Schema) -> None:
        """Replace `oneOf` by `anyOf`, with alternatives that exclude each other."""
        alternatives = schema.get("oneOf")
        if not isinstance(alternatives, list):
            return
        # What several alternatives allow whatever its value, matches more than one.
        found = [self._resolved(each) for each in alternatives]
        kinds = frozenset(kind for kind in _types(schema) if sum(_allows_all(each, kind) for each in found) <= 1)
        exclusive = self._exclusive(alternatives, kinds)
        if exclusive is None or not kinds:
            return
        if kinds != _types(schema):
            given = [schema["type"]] if isinstance(schema.get("type"), str) else names_of(schema.get("type"))
            schema["type"] = [name for name in given or sorted(_TYPES) if _plain(name) in kinds]
        del schema["oneOf"]
        if "anyOf" in schema:
            schema["allOf"] = [*_listed(schema, "allOf"), {"anyOf": exclusive}]
        else:
            schema["anyOf"] = exclusive

    def _exclusive(self, alternatives: Sequence[Any], kinds: frozenset[str]) -> list[Any] | None:
        """Return alternatives of which a value matches one at most, each without what another allows; None if unknown.

        `kinds` are the types that the value may have.
        """
        without: dict[int, list[object]] = {number: [] for number in range(len(alternatives))}
        for one, other in combinations(range(len(alternatives)), 2):
            if self._disjoint(alternatives[one], alternatives[other], kinds):
                continue
            for number, against in ((one, other), (other, one)):
                if (negated := self.negated(alternatives[against])) is None:
                    return None
                without[number].append(negated)
        return [
            {"allOf": [alternative, *without[number]]} if without[number] else alternative
            for number, alternative in enumerate(alternatives)
        ]

    def are_disjoint(self, schemas: Sequence[object]) -> bool:
        """No value matches two of the schemas; False if that is not certain."""
        return all(self._disjoint(one, other) for one, other in combinations(schemas, 2))

    def _disjoint(  # noqa: PLR0911 - each rule ends it
        self, one: object, other: object, kinds: frozenset[str] = _TYPES, levels: int = _LEVELS
    ) -> bool:
        """No value of these types matches both schemas; False if that is not certain.

        Some of their requirements are enough to know: a value that matches a schema matches each part of it.
        """
        self._left -= 1
        one, other = self._resolved(one), self._resolved(other)
        if one is False or other is False:
            return True
        if not isinstance(one, dict) or not isinstance(other, dict) or levels == 0 or self._left < 0:
            return False
        common = _types(one) & _types(other) & kinds
        if not common:
            return True
        values, others = _scalars(one), _scalars(other)
        if values is not None and others is not None and not values & others:
            return True
        for this, that in ((one, other), (other, one)):
            if any(self._disjoint(part, that, common, levels - 1) for part in _listed(this, "allOf")):
                return True
            parts = _listed(this, "anyOf")
            if parts and all(self._disjoint(part, that, common, levels - 1) for part in parts):
                return True
        # One of them requires the property, so a value that matches both has it.
        return common == {"object"} and any(
            self._disjoint(_property(one, key), _property(other, key), _TYPES, levels - 1)
            for key in {*names_of(one.get("required")), *names_of(other.get("required"))}
        )

    def _resolved(self, schema: object) -> object:
        """Follow up to four references within the root schema."""
        for _ in range(_LEVELS):
            if not isinstance(schema, dict) or not isinstance(reference := schema.get("$ref"), str):
                return schema
            schema = target_of(self._root, reference)
        return schema

    def negated(self, schema: object, levels: int = _LEVELS) -> Schema | bool | None:
        """Return a schema of exactly the values that do not match; None if there is none here."""
        if isinstance(schema, bool):
            return not schema
        self._negations -= 1
        if not isinstance(schema, dict) or levels == 0 or self._negations < 0:
            return None
        words = schema.keys() - _ANNOTATIONS
        if "$ref" in words:
            target = target_of(self._root, schema["$ref"]) if isinstance(schema["$ref"], str) else None
            return self.negated(target, levels - 1) if len(words) == 1 else None
        ways: list[object] = []
        for word in (word for word in schema if word in words):
            found = self._ways(word, schema[word], levels)
            if found is None:
                return None
            ways += found
        return {"anyOf": ways} if ways else False

    def _ways(self, word: str, value: Any, levels: int) -> Sequence[object] | None:  # noqa: ANN401, PLR0911 - JSON
        """Return schemas; a value that violates the keyword matches at least one of them."""
        match word:
            case "type":
                names = {value} if isinstance(value, str) else set(names_of(value))
                if not names or not set(map(_plain, names)) <= _TYPES or ("integer" in names) > ("number" in names):
                    return None
                return [{"type": rest}] if (rest := sorted(_TYPES - names)) else []
            case "const" | "enum":
                return _other_values([value] if word == "const" else value)
            case "required":
                return [{"type": "object", "properties": {name: False}} for name in names_of(value)]
            case "properties" if isinstance(value, dict):
                inner = {key: self.negated(each, levels - 1) for key, each in value.items()}
                if None in inner.values():
                    return None
                return [
                    {"type": "object", "properties": {key: each}, "required": [key]}
                    for key, each in inner.items()
                    if each is not False
                ]
            case "not":
                return [value]
            case "allOf" | "anyOf" if isinstance(value, list):
                found = [self.negated(each, levels - 1) for each in value]
                if None in found:
                    return None
                return found if word == "allOf" else [{"allOf": found}]
            case _:
                return None


def _at_most_one(number: object) -> bool:
    return isinstance(number, int) and number <= 1


def _least_one(schema: Schema) -> Iterator[object]:
    """Replace `minProperties` where some property is optional, which llguidance does not support."""
    least, listed, required = (
        schema.get("minProperties"),
        mapping(schema, "properties"),
        set(names_of(schema.get("required"))),
    )
    if not isinstance(least, int) or "maxProperties" in schema:
        return
    if least <= len(required):
        del schema["minProperties"]
    elif least == 1 and listed and len(listed) <= _MOST_LISTED:
        del schema["minProperties"]
        ways: list[object] = [{"required": [name]} for name in listed]
        if schema.get("additionalProperties") is not False or "patternProperties" in schema:
            ways.append({"properties": dict.fromkeys(listed, False), "minProperties": 1})
        yield {"anyOf": ways}


def _allows_all(schema: object, kind: str) -> bool:
    """A schema allows all values of a type; False if that is not certain."""
    if not isinstance(schema, dict):
        return schema is True
    others = set().union(*(words for other, words in _KINDS.items() if other != kind))
    return not schema.keys() - _ANNOTATIONS - others - {"type"} and (
        "type" not in schema
        or kind in ({schema["type"]} if isinstance(schema["type"], str) else names_of(schema["type"]))
    )


def _property(schema: Schema, key: str) -> object:
    """Return the schema of a property, if it exists; others may apply too."""
    if key in (listed := mapping(schema, "properties")):
        return listed[key]
    return schema.get("additionalProperties", True) if not mapping(schema, "patternProperties") else True


def _types(schema: Schema) -> frozenset[str]:
    """Return the types that a schema allows; an integer is a number."""
    named = schema.get("type")
    names = [named] if isinstance(named, str) else names_of(named)
    types = frozenset(map(_plain, names)) & _TYPES or _TYPES
    values = _scalars(schema)
    return types if values is None else types & {kind for kind, _ in values}


def _plain(name: str) -> str:
    return "number" if name == "integer" else name


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


def _other_values(values: object) -> list[object] | None:
    """Return schemas of all values but these scalars; None for others."""
    found = _scalars({"enum": values})
    if found is None:
        return None
    by_type: dict[str, list[Any]] = {}
    for kind, value in found:
        by_type.setdefault(kind, []).append(value)
    strings = by_type.get("string", [])
    if sum(map(len, strings)) > _MOST_LETTERS or max(map(len, strings), default=0) > _LONGEST:
        return None
    ways: list[object] = [{"type": sorted(_TYPES - by_type.keys())}] if _TYPES - by_type.keys() else []
    ways += [{"const": not value} for value in by_type.get("boolean", []) if len(by_type["boolean"]) == 1]
    if strings:
        ways.append({"type": "string", "pattern": f"^(?:{_other_strings(strings)})$"})
    if numbers := sorted(by_type.get("number", [])):
        ends = [{"exclusiveMaximum": numbers[0]}, {"exclusiveMinimum": numbers[-1]}]
        between = [{"exclusiveMinimum": low, "exclusiveMaximum": high} for low, high in pairwise(numbers)]
        ways += [{"type": "number", **bounds} for bounds in (*ends, *between)]
    return ways


def _other_strings(strings: Iterable[str]) -> str:
    """Return a regular expression of all strings but these: each leaves the tree of their letters somewhere."""
    behind: dict[str, list[str]] = {}
    for string in set(strings) - {""}:
        behind.setdefault(string[0], []).append(string[1:])
    letters = sorted(behind)
    other = f"[^{''.join(map(_in_class, letters))}]" if letters else "(?s:.)"
    ways = ([] if "" in strings else [""]) + [f"{other}(?s:.)*"]
    ways += [f"[{_in_class(letter)}](?:{_other_strings(behind[letter])})" for letter in letters]
    return "|".join(ways)


def _in_class(letter: str) -> str:
    return letter if letter.isalnum() and letter.isascii() else f"\\U{ord(letter):08x}"


def _listed(schema: Schema, word: str) -> list[Any]:
    found = schema.get(word)
    return found if isinstance(found, list) else []


def names_of(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
