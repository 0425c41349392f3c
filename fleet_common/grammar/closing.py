"""Close the objects of a JSON schema: they have no keys but those that the schema names.

By the standard, an object with `properties` may have any further keys, unless `additionalProperties` forbids them.
Small models then invent keys until their tokens are used up.

Schemas that apply to one value (`allOf`, `$ref` with `properties` next to it, …) are closed together, by all keys that
they name: each alone would exclude the keys of the others. Alternatives are closed one by one.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from fleet_common.grammar.rewriting import Rewriter, Schema, direct, mapping, names_of, target_of

_MOST_STEPS: Final = 20_000
"""Schemas that are looked at, some 0.02 s. A schema that takes more is left as it is."""

_DECIDED: Final = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_CONDITIONS: Final = ("if", "not")
_DEPENDENT: Final = ("dependentSchemas", "dependencies")
_NEEDED: Final = ("dependentRequired", "dependencies")
_OF_OBJECTS: Final = frozenset((*_DECIDED, *_CONDITIONS, *_DEPENDENT, *_NEEDED, "required", "minProperties"))


def closed(schema: Schema) -> Schema:
    """Return a schema whose objects are closed where it does not say otherwise."""
    copy: Schema = json.loads(json.dumps(schema))
    try:
        _Closing(copy).close()
    except _TooLarge:
        return schema
    return copy


class _TooLarge(Exception): ...  # noqa: N818


class _Closing:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._left = _MOST_STEPS
        self._rewriter = Rewriter(root)
        self._seen = set[int]()
        self._open = set[int]()  # schemas that are not closed by themselves
        self._closed: list[tuple[Schema, set[str]]] = []  # with the keys of their objects

    def close(self) -> None:
        waiting: list[object] = [self._root]
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, dict) and id(schema) not in self._seen:
                self._seen.add(id(schema))
                waiting += self._visit(schema)
        for schema, keys in self._closed:
            if id(schema) not in self._open:
                listed = mapping(schema, "properties")
                schema["properties"] = {**listed, **dict.fromkeys(sorted(keys - listed.keys()), True)}
                schema["additionalProperties"] = False

    def _visit(self, schema: Schema) -> Iterable[object]:
        """Close what describes one value; return the schemas of other values in it."""
        applied = list(self._applied(schema))
        naming = [each for each in applied if any(map(self._names_keys, each[1]))]
        if not mapping(schema, "properties") and len(naming) == 1:
            ((word, parts),) = naming
            others = (
                each for which in applied if which is not naming[0] for part in which[1] for each in self._members(part)
            )
            if self._are_separate(word, parts, [schema, *others]):
                return [*parts, *_values([schema])]
        members = list(self._members(schema))
        self._open.update(map(id, members[1:]))
        for member in members:
            self._keep_open(member[word] for word in _CONDITIONS if word in member)
            alternatives = member.get("oneOf")
            if isinstance(alternatives, list) and not self._rewriter.are_disjoint(alternatives):
                self._keep_open(alternatives)
        if any("properties" in member for member in members) and (keys := _keys(members)) is not None:
            self._closed.append((schema, keys))
        values = list(_values(members))
        separate = set(map(id, values))
        self._keep_open(value for member in members for value in _inner(member) if id(value) not in separate)
        return values

    def _are_separate(self, word: str, parts: list[object], others: Iterable[Schema]) -> bool:
        """Each part describes its objects alone; `others` apply to the same values and name no keys."""
        if any(_OF_OBJECTS & other.keys() for other in others):
            return False
        return word in ("allOf", "anyOf", "$ref") or (word == "oneOf" and self._rewriter.are_disjoint(parts))

    def _applied(self, schema: Schema) -> Iterator[tuple[str, list[object]]]:
        """Return the schemas that apply to the same value, those of an alternative together."""
        if isinstance(reference := schema.get("$ref"), str):
            yield "$ref", [target_of(self._root, reference)]
        for word in ("allOf", "anyOf", "oneOf"):
            if isinstance(found := schema.get(word), list):
                yield from ((word, [each]) for each in found) if word == "allOf" else [(word, found)]
        yield from ((word, [schema[word]]) for word in ("if", "then", "else") if word in schema)
        for word in _DEPENDENT:
            yield word, list(mapping(schema, word).values())

    def _members(self, schema: object) -> Iterator[Schema]:
        """Return a schema and all that apply to the same value, directly or not."""
        waiting, seen = [schema], set[int]()
        while waiting:
            found = waiting.pop()
            if isinstance(found, dict) and id(found) not in seen:
                if not self._left:
                    raise _TooLarge
                self._left -= 1
                seen.add(id(found))
                yield found
                waiting += [part for _, parts in self._applied(found) for part in parts]

    def _names_keys(self, schema: object) -> bool:
        return any("properties" in member for member in self._members(schema))

    def _keep_open(self, schemas: Iterable[object]) -> None:
        """Leave schemas and all in them as they are: their negation, or both of two, must stay possible."""
        waiting = list(schemas)
        while waiting:
            found = waiting.pop()
            if isinstance(found, dict) and id(found) not in self._open:
                if not self._left:
                    raise _TooLarge
                self._left -= 1
                self._open.add(id(found))
                waiting += direct(found)
                if isinstance(reference := found.get("$ref"), str):
                    waiting.append(target_of(self._root, reference))


def _keys(members: list[Schema]) -> set[str] | None:
    """Return the keys that schemas of one value name; None if they are not to be closed."""
    keys = set[str]()
    for member in members:
        values = [member.get("const"), *(member["enum"] if isinstance(member.get("enum"), list) else ())]
        if any(word in member for word in _DECIDED) or any(isinstance(value, dict) for value in values):
            return None
        keys.update(mapping(member, "properties"), names_of(member.get("required")))
        for word in _NEEDED:
            for key, needed in mapping(member, word).items():
                keys.update((key, *([needed] if isinstance(needed, str) else names_of(needed))))
    least = max((n for member in members if isinstance(n := member.get("minProperties"), int)), default=0)
    return keys if least <= len(keys) else None


_ITEMS: Final = ("items", "additionalItems", "additionalProperties")


def _values(members: list[Schema]) -> Iterator[object]:
    """Return the schemas of other values in a value, each of which describes its own alone."""
    holders = [member for member in members if any(True for _ in _inner(member))]
    if len(holders) == 1:
        if not (mapping(holders[0], "properties") and mapping(holders[0], "patternProperties")):
            yield from _inner(holders[0])
    elif not any(word in member for member in holders for word in _DECIDED):
        names = Counter(name for member in holders for name in mapping(member, "properties"))
        for member in holders:
            yield from (value for name, value in mapping(member, "properties").items() if names[name] == 1)


def _inner(schema: Schema) -> Iterator[object]:
    for word in ("properties", "patternProperties"):
        yield from mapping(schema, word).values()
    for word in _ITEMS:
        if word in schema:
            found = schema[word]
            yield from found if isinstance(found, list) else [found]
    if isinstance(prefix := schema.get("prefixItems"), list):
        yield from prefix
