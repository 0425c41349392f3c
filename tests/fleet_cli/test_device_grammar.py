from pathlib import Path

import pytest

from fleet_cli.device import read_grammar
from fleet_cli.errors import CommandError
from schemas.policy import Grammar


def test_a_grammar_comes_from_a_file_or_a_flag(tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "text.lark"
    schema.write_text('{"type": "object"}')
    lark.write_text('start: "a"')
    assert read_grammar(json_schema=schema, regex=None, lark=None) == Grammar.json_schema({"type": "object"})
    assert read_grammar(json_schema=None, regex="a+", lark=None) == Grammar.regex("a+")
    assert read_grammar(json_schema=None, regex=None, lark=lark) == Grammar.lark('start: "a"')
    assert read_grammar(json_schema=None, regex=None, lark=None) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "JSON"),
        (b"\xff", "not UTF-8"),
        (None, "cannot be read"),
        (b'"' + b"x" * 70_000 + b'"', "65536 bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_sentence(tmp_path: Path, content: bytes | None, says: str) -> None:
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_bytes(content)
    with pytest.raises(CommandError, match=says):
        read_grammar(json_schema=schema, regex=None, lark=None)


def test_two_grammars_go_not_together(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--regex"):
        read_grammar(json_schema=None, regex="a", lark=tmp_path / "x")
