from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.schemas import SchemaAnswer, complaint, judge

DAY = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}


@pytest.mark.parametrize(
    ("text", "schema", "said"),
    [
        ('{"day": "2026-11-28"}', DAY, ""),
        ("{}", DAY, "'day' is a required property"),
        ('{"day": "soon"}', DAY, "'soon' is not a 'date'"),
        ('{"day"', DAY, "JSON"),
        ("5", {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 5, "exclusiveMinimum": True}, "5"),
    ],
)
def test_an_answer_is_judged_by_the_draft_that_its_schema_names(text: str, schema: Any, said: str) -> None:
    found = complaint(text, schema)
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.parametrize(
    ("answers", "sound"),
    [
        ([("valid", 9.0)] * 19 + [("refused", 0.1)], True),
        ([("valid", 9.0)] * 18 + [("refused", 0.1)] * 2, False),
        ([("valid", 9.0)] * 19 + [("refused", 0.5)], False),
        ([("valid", 9.0)] * 19 + [("wrong", 0.1)], False),
        ([("truncated", 9.0)] * 19 + [("failed", 0.1)], False),
    ],
)
def test_wrong_answers_many_refusals_and_slow_ones_miss_a_goal(answers: list[tuple[str, float]], sound: bool) -> None:
    found = judge([SchemaAnswer(f"{number}", *answer) for number, answer in enumerate(answers)])
    assert found.sound == sound


@pytest.mark.parametrize("text", ["{", '{"path": "a"}', "[]"])
def test_what_is_no_collection_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "schemas.jsonl"
    file.write_text(text)
    assert main(["schemas", str(file)]) == 2
