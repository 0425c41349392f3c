import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_common.grammar.bounds import FORMATS, bounded_text
from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarError
from fleet_common.grammar.process import GrammarTokenizer
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
        "allOf": [{"not": {"format": "byte"}}],
    }
    assert simplified(schema) == {
        "type": "object",
        "properties": {"format": {"type": "string"}, "day": {"format": "date"}},
        "default": {"format": "kept"},
        "enum": [{"format": "kept"}],
        "items": [{}],
        "allOf": [{"not": {}}],
    }
    assert bounded_text(Grammar.lark('start: %json {"format": "frob"}\n')) == "start: %json {}\n"


@pytest.mark.parametrize("form", [*sorted(FORMATS), "frob", "int32"])
def test_every_format_is_taken(form: str) -> None:
    COMPILER.matcher(Grammar.json_schema({"type": "string", "format": form}))


EXCLUSIVE: list[dict[str, Any]] = [
    {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": tagged("a"), "b": tagged("b")}},
    {"oneOf": [{"$ref": "#/$defs/a"}, tagged("b")], "$defs": {"a": {"$ref": "#/$defs/x"}, "x": tagged("a")}},
    {"oneOf": [{"type": "string"}, {"type": ["integer", "null"]}, {"enum": [True]}]},
    {"oneOf": [{"const": 1}, {"const": True}, {"const": "1"}]},
    {"oneOf": [tagged("a", inner=tagged("x")), tagged("b")]},
    {"items": {"oneOf": [{"type": "object", "properties": {"x": tagged("a")}, "required": ["x"]},
                         {"type": "object", "properties": {"x": tagged("b")}}]}},
]  # fmt: skip

OVERLAPPING: list[dict[str, Any]] = [
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"oneOf": [{"type": "string"}, {"enum": ["a", 1]}]},
    {"oneOf": [{"const": 1}, {"const": 1.0}]},
    {"oneOf": [{"const": [1]}, {"const": [1.0]}]},
    {"oneOf": [{"properties": {"kind": {"const": "a"}}, "required": ["kind"]}, tagged("b")]} | {"type": "array"},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}}}, {"type": "object"}]},
    {"oneOf": [{"$ref": "#/$defs/none"}, {"$ref": "https://example.org/"}]},
    {"oneOf": [{"$ref": "#/$defs/r"}, {"type": "string"}], "$defs": {"r": {"$ref": "#/$defs/r"}}},
    {"oneOf": [{}, {"type": "string"}]},
]


@pytest.mark.parametrize("schema", EXCLUSIVE)
def test_one_of_alternatives_that_exclude_each_other_is_any_of_them(schema: dict[str, Any]) -> None:
    assert "oneOf" not in json.dumps(simplified(schema))
    COMPILER.matcher(Grammar.json_schema(schema))


@pytest.mark.parametrize("schema", OVERLAPPING)
def test_one_of_alternatives_that_may_overlap_is_not_approximated(schema: dict[str, Any]) -> None:
    assert simplified(schema) == schema


@pytest.mark.parametrize("more", [{}, {"x-guidance": {"coerce_one_of": True}}])
def test_a_refusal_of_one_of_names_the_keyword_and_no_option_of_a_library(more: dict[str, Any]) -> None:
    with pytest.raises(GrammarError) as found:
        COMPILER.matcher(Grammar.json_schema({"oneOf": [{"type": "string"}, {"type": "string"}]} | more))
    assert "oneOf" in str(found.value)
    assert "coerce" not in str(found.value)


SCALARS = st.sampled_from([None, True, False, 0, 1, 1.5, "a", "b"])
LEAVES = st.one_of(
    st.builds(lambda value: {"const": value}, SCALARS),
    st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=3)),
    st.builds(
        lambda kind: {"type": kind}, st.sampled_from(["null", "boolean", "integer", "number", "string", "object"])
    ),
    st.builds(lambda kind: {"type": [kind, "null"]}, st.sampled_from(["boolean", "integer", "string"])),
)
OBJECTS = st.builds(
    lambda properties, required: {"type": "object", "properties": properties, "required": sorted(required)},
    st.dictionaries(st.sampled_from("xy"), LEAVES, max_size=2),
    st.sets(st.sampled_from("xy")),
)
VALUES: list[Any] = [None, True, False, 0, 1, 1.5, 2, "a", "b", "c"]
VALUES += [
    {key: value for key, value in zip("xy", pair, strict=True) if value != "absent"}
    for pair in itertools.product([*VALUES, "absent"], repeat=2)
]


@given(st.lists(st.one_of(LEAVES, OBJECTS), min_size=2, max_size=3))
def test_no_value_matches_two_alternatives_of_what_has_become_any_of(alternatives: list[dict[str, Any]]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    if "anyOf" not in simplified({"oneOf": alternatives}):
        return
    validators = [jsonschema.Draft202012Validator(each) for each in alternatives]
    for value in VALUES:
        assert sum(validator.is_valid(value) for validator in validators) <= 1
