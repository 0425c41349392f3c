import itertools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st

from fleet_common.grammar.bounds import bounded_text
from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarError, OutsideGrammar
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_common.grammar.rewriting import FORMATS
from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.policy import Grammar, GrammarKind

LETTERS = [chr(code) for code in range(32, 127)]
COMPILER = GrammarCompiler(lambda: GrammarTokenizer.of_words([*LETTERS, "end"], end_tokens=[len(LETTERS)]))


def simplified(schema: dict[str, Any]) -> Any:
    return json.loads(bounded_text(Grammar.json_schema(schema)))


def tagged(name: str, **more: object) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}, **more}, "required": ["kind"]}


TOO_MUCH = {
    "properties": {"properties": {f"p{each}": {} for each in range(2001)}},
    "definitions": {"$defs": {f"p{each}": {} for each in range(1001)}},
    "constants": {"enum": ["x" * 20_000, "y" * 20_000]},
    "references": {
        "$defs": {f"{each}": {"items": {"$ref": f"#/$defs/{each + 1}"}} for each in range(300)},
        "$ref": "#/$defs/0",
    },
    "references by way of a list": {
        "$defs": {f"{each}": {"items": {"$ref": f"#/$defs/{each + 1}"}} for each in range(300)},
        "anyOf": [{"$ref": f"#/$defs/{each}"} for each in range(300)],
    },
}


@pytest.mark.parametrize("schema", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_schema_that_is_too_large_in_one_dimension_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError):
        bounded_text(Grammar.json_schema(schema))


@pytest.mark.parametrize(("before", "behind"), [('{"items":', "}"), ("[", "]"), ('{"a":[', "]}")])
@pytest.mark.parametrize("levels", [101, 2_000, 6_000])
def test_deep_nesting_is_refused_whatever_pythons_parser_makes_of_it(before: str, behind: str, levels: int) -> None:
    text = f'{{"default":{before * levels}1{behind * levels}}}'
    with pytest.raises(GrammarError):
        bounded_text(Grammar(kind=GrammarKind.JSON_SCHEMA, text=text))


@pytest.mark.parametrize(
    "text",
    [
        "start: a0\n" + "".join(f'a{each}: a{each + 1} "x"\n' for each in range(400)) + 'a400: "x"',
        "start: A0\n" + "".join(f"A{each}: /x/ A{each + 1}\n" for each in range(400)) + 'A400: "x"',
        "start: a0\n" + "".join(f'a{each}: "x"\n' for each in range(1001)),
        f"start: %json {json.dumps(TOO_MUCH['references'])}",
        f'start: "a" | %json {json.dumps(TOO_MUCH["constants"])} "b"',
    ],
)
def test_a_lark_grammar_that_is_too_large_is_refused(text: str) -> None:
    with pytest.raises(GrammarError):
        bounded_text(Grammar.lark(text))


def test_a_recursive_schema_and_a_recursive_grammar_are_not_deep() -> None:
    tree = {
        "$defs": {"t": {"properties": {"l": {"$ref": "#/$defs/t"}, "r": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    }
    assert simplified(tree) == tree
    recursive = 'start: list\nlist: item | list "," item\nitem: "(" list ")" | /[a-z]/\n'
    assert bounded_text(Grammar.lark(recursive)) == recursive


@pytest.mark.parametrize(
    "text",
    ['start: "%json {" /[/]:x/ // c: %json [\n', '# start: x\nstart: /a/ | b\nb: "b: c"\n', "start: %json {oops"],
)
def test_what_only_looks_like_a_schema_or_a_rule_is_left_as_it_is(text: str) -> None:
    assert bounded_text(Grammar.lark(text)) == text


def test_an_unknown_format_is_an_annotation_wherever_a_schema_is_and_nowhere_else() -> None:
    schema = {
        "type": "object",
        "format": "frob",
        "properties": {"format": {"type": "string", "format": "int-or-so"}, "day": {"format": "date"}},
        "default": {"format": "kept"},
        "enum": [{"format": "kept"}],
        "items": [{"format": "password"}],
        "allOf": [{"contains": {"format": "byte"}}],
    }
    assert simplified(schema) == {
        "type": "object",
        "properties": {"format": {"type": "string"}, "day": {"format": "date"}},
        "default": {"format": "kept"},
        "enum": [{"format": "kept"}],
        "items": [{}],
        "allOf": [{"contains": {}}],
    }
    elsewhere = {"$ref": "#/components/day", "components": {"day": {"items": {"format": "frob"}}}}
    assert json.loads(bounded_text(Grammar.json_schema(elsewhere)))["components"] == {"day": {"items": {}}}
    assert bounded_text(Grammar.lark('start: %json {"format": "frob"}\n')) == "start: %json {}\n"


@pytest.mark.parametrize("form", [*sorted(FORMATS), "frob", "int32"])
def test_every_format_is_taken(form: str) -> None:
    COMPILER.matcher(Grammar.json_schema({"type": "string", "format": form}))


SCALARS = st.sampled_from([None, True, False, 0, 1, 1.5, "", "a", "b", "ab", "\\", "]"])
LEAVES = st.one_of(
    st.builds(lambda value: {"const": value}, SCALARS),
    st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=3)),
    st.builds(
        lambda kind: {"type": kind}, st.sampled_from(["null", "boolean", "integer", "number", "string", "object"])
    ),
    st.builds(lambda kind: {"type": [kind, "null"]}, st.sampled_from(["boolean", "integer", "string"])),
)
OBJECTS = st.fixed_dictionaries(
    {"required": st.lists(st.sampled_from("xy"), max_size=2, unique=True)},
    optional={
        "properties": st.dictionaries(st.sampled_from("xy"), st.one_of(LEAVES, st.booleans()), max_size=2),
        "type": st.just("object"),
        "additionalProperties": st.booleans(),
        "minProperties": st.sampled_from([0, 1, 2]),
    },
)
PARTS = st.one_of(LEAVES, OBJECTS, st.builds(lambda leaf: {"$ref": "#/$defs/r", "$defs": {"r": leaf}}, OBJECTS))
REWRITTEN = st.fixed_dictionaries(
    {},
    optional={
        "oneOf": st.lists(PARTS, min_size=1, max_size=3),
        "anyOf": st.lists(PARTS, min_size=1, max_size=2),
        "not": PARTS,
        "if": PARTS,
        "then": PARTS,
        "else": PARTS,
        "dependencies": st.dictionaries(st.sampled_from("xy"), st.one_of(st.just(["y"]), OBJECTS), max_size=2),
        "minProperties": st.sampled_from([0, 1, 2]),
        "required": st.lists(st.sampled_from("xy"), max_size=1),
        "properties": st.dictionaries(st.sampled_from("xy"), LEAVES, max_size=2),
        "type": st.sampled_from(["object", "string", ["object", "integer"]]),
    },
)
VALUES: list[Any] = [None, True, False, 0, 1, 1.5, 2, "", "a", "b", "ab", "abc", "\\", "]", []]
VALUES += [
    {key: value for key, value in zip("xyz", triple, strict=True) if value != "absent"}
    for triple in itertools.product([*VALUES, "absent"], [None, 1, "a", "b", "absent"], [1, "absent"])
]


@settings(max_examples=40)
@given(REWRITTEN)
def test_a_rewritten_schema_allows_the_same_values(schema: dict[str, Any]) -> None:
    schema = {**schema, "$defs": {"r": {"type": "object", "required": ["x"]}}}
    before, after = jsonschema.Draft7Validator(schema), jsonschema.Draft7Validator(simplified(schema))
    assert [value for value in VALUES if before.is_valid(value) != after.is_valid(value)] == []


def either(*alternatives: object) -> dict[str, Any]:
    return {"oneOf": [*alternatives]}


KINDS = {"type": "object", "properties": {"kind": {"type": "string"}, "n": {"type": "integer"}}, "required": ["kind"]}
SUPPORTED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "references": (
        either({"$ref": "#/$defs/a"}, tagged("b")) | {"$defs": {"a": {"$ref": "#/$defs/x"}, "x": tagged("a")}},
        ['{"kind": "a"}', '{"kind": "b"}'],
        ['{"kind": "c"}'],
    ),
    "types": (either({"type": "string"}, {"type": ["integer", "null"]}, {"enum": [True]}), ["1", "null"], ["false"]),
    "overlap": (either({"type": "string"}, {"enum": ["a", 1]}), ["1", '"b"'], ['"a"']),
    "one property or the other": (
        KINDS | either({"required": ["kind"]}, {"required": ["n"]}),
        ['{"kind": "a"}'],
        ['{"kind": "a", "n": 1}'],
    ),
    "properties without a type": (
        either(*({"properties": {"k": {"const": name}}, "required": ["k"]} for name in "ab")),
        ['{"k": "a"}', '{"k": "b"}'],
        ["1", '{"k": "c"}'],
    ),
    "not": (KINDS | {"not": {"required": ["n"]}}, ['{"kind": "a"}'], ['{"kind": "a", "n": 1}']),
    "not a string": ({"type": "string", "not": {"enum": ["a]", "b"]}}, ['"a"', '"a]]"', '"c"'], ['"a]"', '"b"']),
    "if": (
        KINDS | {"if": {"properties": {"kind": {"const": "a"}}}, "then": {"required": ["n"]}},
        ['{"kind": "a", "n": 1}', '{"kind": "b"}', '{"kind": "aa"}'],
        ['{"kind": "a"}'],
    ),
    "dependencies": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependencies": {"a": ["b"]}},
        ['{"a": 1, "b": 1}', '{"b": 1}'],
        ['{"a": 1}'],
    ),
    "minProperties": (KINDS | {"required": [], "minProperties": 1}, ['{"n": 1}', '{"z": 1}'], ["{}"]),
    "uniqueItems": ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[1]"], ["[1, 1]"]),
}


@pytest.mark.parametrize(("schema", "allowed", "forbidden"), SUPPORTED.values(), ids=SUPPORTED)
def test_llguidance_takes_rewritten_schemas(schema: dict[str, Any], allowed: list[str], forbidden: list[str]) -> None:
    compiled = COMPILER.compiled(Grammar.json_schema(schema))
    end = len(LETTERS)

    def takes(text: str) -> bool:
        matcher = GrammarMatcher(compiled)
        try:
            return end in matcher.allowed([LETTERS.index(letter) for letter in text])
        except OutsideGrammar:
            return False

    assert [text for text in allowed if not takes(text)] == []
    assert [text for text in forbidden if takes(text)] == []


REFUSED: dict[str, dict[str, Any]] = {
    "oneOf": either({"type": "integer"}, {"type": "number"}),
    "oneOf again": either({"const": [1]}, {"const": [1.0]}),
    "oneOf that is recursive": either({"$ref": "#/$defs/r"}, {}) | {"$defs": {"r": {"$ref": "#/$defs/r"}}},
    "oneOf with an option of a library": either({"minLength": 1}, {"minLength": 2})
    | {"x-guidance": {"coerce_one_of": True}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"pattern": "a"}},
    "if": {"if": {"minItems": 2}, "then": {"maxItems": 5}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_keyword_and_no_option_of_a_library(name: str) -> None:
    with pytest.raises(GrammarError) as found:
        COMPILER.matcher(Grammar.json_schema(REFUSED[name]))
    assert f"'{name.split(maxsplit=1)[0]}'" in str(found.value)
    assert "coerce" not in str(found.value)
