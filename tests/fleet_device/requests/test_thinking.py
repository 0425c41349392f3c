import json

import pytest
from hypothesis import given, strategies as st

from fleet_device.errors import InvalidRequest
from fleet_device.requests.prompt import TextOptions, prepare_request
from fleet_device.requests.thinking import (
    MARKS,
    TemplateOptions,
    Thinking,
    ThinkingMarks,
    ThinkingSplitter,
    after_thinking,
    marks_of,
    thinking_of,
)
from fleet_device.settings import ReasoningEffort
from schemas.policy import Grammar
from tests.support.compiled_grammar import takes
from tests.support.letter_codec import LetterCodec
from tests.support.memory_device import settings

THINK = ThinkingMarks("<think>", "</think>")


def split(thinking: Thinking | None, *parts: str) -> tuple[str, str]:
    splitter = ThinkingSplitter(thinking)
    pairs = [*map(splitter.feed, parts), splitter.finish()]
    thoughts, answers = zip(*pairs, strict=True)
    return "".join(thoughts), "".join(answers)


@pytest.mark.parametrize(
    ("begun", "output", "expected"),
    [
        (False, "<think>\na b\n</think>\n\nc <think> d", ("a b", "c <think> d")),
        (True, "\na < b\n</think>\n\nc", ("a < b", "c")),
        (False, " \n<think>a", ("a", "")),
        (True, "a</thi", ("a</thi", "")),
        (False, "<thin", ("", "<thin")),
        (False, "<then", ("", "<then")),
        (False, "  a <think>b</think>", ("", "  a <think>b</think>")),
        (False, "<think></think>a", ("", "a")),
        (False, "", ("", "")),
    ],
)
def test_an_output_is_divided_once(begun: bool, output: str, expected: tuple[str, str]) -> None:
    assert split(Thinking(THINK, begun=begun), output) == expected


def test_without_thinking_all_is_the_answer() -> None:
    assert split(None, "<think>a</think>b") == ("", "<think>a</think>b")


@given(st.lists(st.sampled_from([*"<>/thinka \n", "<think>", "</think>"]), max_size=30), st.booleans(), st.data())
def test_how_an_output_arrives_changes_nothing(letters: list[str], begun: bool, data: st.DataObject) -> None:
    output = "".join(letters)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=8)))
    parts = [output[start:end] for start, end in zip([0, *cuts], [*cuts, len(output)], strict=True)]
    thinking = Thinking(THINK, begun=begun)
    assert split(thinking, *parts) == split(thinking, output)


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks.closing)
def test_marks_are_found_in_a_template_and_at_the_end_of_a_prompt(marks: ThinkingMarks) -> None:
    template = f"{{{{ {json.dumps(marks.opening)} }}}} … {marks.closing}"
    assert marks_of(template) == marks
    control = [("<|channel|>", 7), ("</think>", 8), ("other", 9)]
    found = thinking_of(template, f"user assistant {marks.opening}\n", control)
    assert found is not None
    assert found.begun
    assert all(text.decode() in marks.opening + marks.closing for text in found.control.values())
    found = thinking_of(template, "user assistant", control)
    assert found is not None
    assert not found.begun
    assert thinking_of(template, f"user {marks.opening}\n{marks.closing}\n", control) is None


def test_a_template_without_marks_does_not_think() -> None:
    assert thinking_of("{{ messages[0].content }}", "<think>", []) is None


def test_the_effort_sets_the_words_of_templates_and_applications_can_override_them() -> None:
    assert TemplateOptions().of("") == {}
    off = TemplateOptions(ReasoningEffort.NONE).of("enable_thinking")
    assert (off["enable_thinking"], off["thinking"]) == (False, False)
    assert TemplateOptions(ReasoningEffort.HIGH).of("")["reasoning_effort"] == "high"
    assert TemplateOptions(ReasoningEffort.NONE, {"enable_thinking": True, "x": 1}).of("") == {
        **off,
        "enable_thinking": True,
        "x": 1,
    }
    assert TemplateOptions(ReasoningEffort.NONE).of("<|channel|>final<|message|>")["reasoning_effort"] == "low"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token"])
def test_an_application_cannot_replace_the_messages(name: str) -> None:
    with pytest.raises(InvalidRequest):
        prepare_request("Hi", settings(), chat_template_kwargs={name: "x"})


@pytest.mark.parametrize(
    ("options", "tokens"),
    [({}, 7), ({"thinking_token_budget": 3}, 3), ({"logprobs": 0}, None)],
    ids=["the device's", "its own", "with log-probabilities"],
)
def test_a_budget_is_the_requests_or_the_devices(options: TextOptions, tokens: int | None) -> None:
    codec = LetterCodec("{{ messages[0].content }}{# <think></think> #}")
    budget = prepare_request("Hi", settings(thinking_token_budget=7), **options).encode(codec).budget
    assert (budget and budget.tokens) == tokens


# Grammars


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
GRAMMARS = {
    "schema": (Grammar.json_schema(SCHEMA), '{"a": 12}', '{"a": "x"}'),
    "object": (Grammar(kind="json-object"), "{}", "[]"),
    "regex": (Grammar(kind="regex", text="[0-9]+/[0-9]+"), "1/2", "1"),
    "escaped": (Grammar(kind="regex", text=r"[0-9]+\/[0-9]+"), "1/2", "1"),
    "lark": (Grammar.lark('start: word+\nword: "start: "\n'), "start: start: ", "star"),
}


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_grammar_begins_after_the_thinking(kind: str) -> None:
    grammar, right, wrong = GRAMMARS[kind]
    begun, maybe = (after_thinking(grammar, Thinking(THINK, begun=each)) for each in (True, False))
    assert takes(begun, f'so {{"a": 1}}\n</think>\n\n{right}')
    assert not takes(begun, f"so</think>{wrong}")
    assert not takes(begun, "so")
    assert takes(maybe, f"<think>so</think>{right}")
    assert takes(maybe, right)
    assert not takes(maybe, f"<think>so</think>{wrong}")
    assert not takes(maybe, f"so</think>{right}")


def test_a_grammar_stays_as_it_is_where_marks_are_control_tokens() -> None:
    grammar = GRAMMARS["schema"][0]
    assert after_thinking(grammar, Thinking(THINK, control={5: b"</think>"})) is grammar


def test_a_request_has_the_grammar_after_its_thinking_unless_the_application_wrote_it() -> None:
    codec = LetterCodec("{{ messages[0].content }}<think>{# </think> #}")
    made = prepare_request("Hi", settings(), grammar=GRAMMARS["schema"][0]).encode(codec)
    assert made.thinking is not None
    assert made.policy.grammar == after_thinking(GRAMMARS["schema"][0], made.thinking)
    own = prepare_request("Hi", settings(), grammar=GRAMMARS["lark"][0]).encode(codec)
    assert own.policy.grammar == GRAMMARS["lark"][0]
    with pytest.raises(InvalidRequest):
        prepare_request("Hi", settings(), grammar=Grammar(kind="regex", text="a" * 65_500)).encode(codec)
