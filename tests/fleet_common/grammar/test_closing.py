import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings

from fleet_common.grammar.closing import closed
from fleet_common.grammar.errors import OutsideGrammar
from schemas.policy import Grammar
from tests.fleet_common.grammar.test_bounds import COMPILER, LETTERS, REWRITTEN, VALUES

STRING, NUMBER = {"type": "string"}, {"type": "integer"}


def with_keys(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


A, B = with_keys("a", a=STRING), with_keys("b", b=STRING)
TREE = {"$ref": "#/$defs/node", "$defs": {"node": with_keys("v", v=NUMBER, below={"$ref": "#/$defs/node"})}}
CAT, DOG = with_keys("kind", kind={"const": "cat"}, c=NUMBER), with_keys("kind", kind={"const": "dog"}, d=NUMBER)
SHARED = {"properties": {"x": {"$ref": "#/$defs/a"}, "y": {"$ref": "#/$defs/a", **B}}, "$defs": {"a": A}}

CLOSED = {
    "an object": (A, [{"a": "x"}], [{"a": "x", "b": 1}]),
    "no keys": (with_keys(), [{}], [{"a": 1}]),
    "within": (with_keys("x", x=A), [{"x": {"a": ""}}], [{"x": {"a": "", "b": 1}}]),
    "in a list": ({"type": "array", "items": A}, [[{"a": ""}]], [[{"a": "", "b": 1}]]),
    "in a tuple": ({"type": "array", "prefixItems": [A]}, [[{"a": ""}]], [[{"a": "", "b": 1}]]),
    "definitions": (TREE, [{"v": 1, "below": {"v": 2}}], [{"v": 1, "below": {"v": 2, "w": 1}}]),
    "alternatives": ({"anyOf": [A, B]}, [{"a": ""}, {"b": ""}], [{"a": "", "b": ""}]),
    "alternatives that exclude each other": (
        {"oneOf": [CAT, DOG]},
        [{"kind": "cat", "c": 1}],
        [{"kind": "cat", "d": 1}],
    ),
    "optional": ({"anyOf": [A, {"type": "null"}]}, [{"a": ""}, None], [{"a": "", "b": 1}]),
    "one reference, described": (
        {"allOf": [{"$ref": "#/$defs/a"}], "description": "A.", "$defs": {"a": A}},
        [{"a": ""}],
        [{"a": "", "b": 1}],
    ),
    "all of": ({"allOf": [A, B]}, [{"a": "", "b": ""}], [{"a": "", "b": "", "c": 1}]),
    "a reference beside keys": (
        {"$ref": "#/$defs/a", **B, "$defs": {"a": A}},
        [{"a": "", "b": ""}],
        [{"a": "", "b": "", "c": 1}],
    ),
    "alternatives of required keys": (
        {"properties": {"a": STRING, "b": STRING}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": ""}, {"b": ""}, {"a": "", "b": ""}],
        [{"a": "", "c": 1}],
    ),
    "keys beside alternatives": (
        {**with_keys("id", id=NUMBER), "anyOf": [A, B]},
        [{"id": 1, "a": ""}, {"id": 1, "b": ""}],
        [{"id": 1, "a": "", "c": 1}],
    ),
    "a required key that is not described": ({**A, "required": ["a", "q"]}, [{"a": "", "q": 1}], [{"a": "", "r": 1}]),
    "a key required beside a reference": (
        {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["q"]}], "$defs": {"a": A}},
        [{"a": "", "q": 1}],
        [{"a": "", "q": 1, "r": 1}],
    ),
    "a definition that is used alone and beside keys": (
        SHARED,
        [{"x": {"a": ""}}, {"y": {"a": "", "b": ""}}],
        [{"z": 1}, {"y": {"a": "", "b": "", "c": 1}}],
    ),
    "alternatives that overlap": (
        {"oneOf": [A, B]},
        [{"a": ""}, {"b": ""}],
        [{"a": "", "b": ""}, {"a": "", "c": 1}],
    ),
    "conditions": (
        {
            **with_keys("kind", kind=STRING),
            "if": {"properties": {"kind": {"const": "x"}}},
            "then": {"properties": {"x": NUMBER}, "required": ["x"]},
        },
        [{"kind": "y"}, {"kind": "x", "x": 1}],
        [{"kind": "y", "z": 1}],
    ),
}

OPEN = {
    "any object": ({"type": "object"}, {"a": 1}),
    "as it says": ({**A, "additionalProperties": True}, {"a": "", "b": 1}),
    "other keys have a schema": ({**A, "additionalProperties": NUMBER}, {"a": "", "b": 1}),
    "keys by pattern": ({**A, "patternProperties": {"^x": NUMBER}}, {"a": "", "x1": 1}),
    "more keys than it names": ({**A, "minProperties": 2}, {"a": "", "b": 1}),
    "a constant": ({**A, "enum": [{"a": "", "b": 1}]}, {"a": "", "b": 1}),
}


def is_allowed(schema: dict[str, Any], value: object) -> bool:
    text = json.dumps(value)
    try:
        COMPILER.matcher(Grammar.json_schema(schema)).check([*map(LETTERS.index, text), len(LETTERS)])
    except OutsideGrammar:
        return False
    return True


@pytest.mark.parametrize("name", CLOSED)
def test_objects_have_the_keys_that_their_schema_names(name: str) -> None:
    schema, good, bad = CLOSED[name]
    shut = closed(schema)
    for value in (*good, *bad):
        assert jsonschema.Draft202012Validator(shut).is_valid(value) is (value in good), value
        assert is_allowed(shut, value) is (value in good), value
    for value in good:
        jsonschema.validate(value, schema)


@pytest.mark.parametrize("name", OPEN)
def test_an_object_stays_open_where_its_schema_says_so(name: str) -> None:
    schema, value = OPEN[name]
    assert closed(schema) == schema
    jsonschema.validate(value, closed(schema))


def test_what_is_negated_stays_as_it_is() -> None:
    """A closed object has no negation here, so that the keyword would be refused."""
    forbidden = {"properties": {"a": with_keys("x", x={"const": 1})}, "required": ["a"]}
    shut = closed({**with_keys(a=with_keys("x", x=NUMBER)), "not": forbidden})
    assert shut["not"] == forbidden
    assert shut["properties"]["a"]["additionalProperties"] is False


@settings(max_examples=40)
@given(REWRITTEN)
def test_closing_takes_some_values_away_and_never_all(schema: dict[str, Any]) -> None:
    schema = {**schema, "$defs": {"r": {"type": "object", "required": ["x"]}}}
    before, after = jsonschema.Draft7Validator(schema), jsonschema.Draft7Validator(closed(schema))
    left = list(filter(after.is_valid, VALUES))
    assert all(map(before.is_valid, left))
    named = [value for value in VALUES if not isinstance(value, dict) or "z" not in value]
    assert left or not any(map(before.is_valid, named))


def test_a_schema_that_takes_too_long_is_left_as_it_is() -> None:
    chain = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(1000)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, "d1000": A}}
    assert closed(schema) == schema
