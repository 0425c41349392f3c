import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from fleet_common.grammar.errors import GrammarUnavailable
from fleet_device.drafters.model_file import GgufModel
from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.llama_cpp.target import GgufTarget
from fleet_edge.verifiers.tokens import GgufTokenizer, chat_format, grammar_tokenizer
from schemas.policy import Grammar
from tests.support.compiled_grammar import compile_grammar
from tests.support.prepared_models import prepared
from tests.support.tiny_gguf import sentencepiece_rows, tiny_gguf

SCHEMA = Grammar.json_schema(
    {
        "type": "object",
        "properties": {
            "größe": {"type": "integer"},
            "kind": {"enum": ["pump", "Ventil", "弁"]},
            "text": {"type": "string"},
        },
        "required": ["größe", "kind", "text"],
        "additionalProperties": False,
    }
)


@pytest.mark.models
def test_both_files_of_a_model_allow_and_force_the_same_tokens() -> None:
    file = GgufTarget(prepared("Q4_0.gguf"), vocabulary_only=True)
    of_file = compile_grammar(SCHEMA, file.grammar_tokenizer())
    tokens = grammar_tokenizer(prepared("target"), vocabulary=file.vocabulary.size, end_tokens=file.end_tokens)
    of_folder = compile_grammar(SCHEMA, tokens)
    text: list[int] = []
    while text[-1:] != [file.end_tokens[0]] and len(text) < 40:
        assert of_file.forced(text) == of_folder.forced(text)
        allowed = of_file.allowed(text)
        assert allowed.tolist() == of_folder.allowed(text).tolist()
        text.append(int(allowed[len(allowed) // 2]) if len(text) < 24 else int(allowed[0]))
    file.close()


def test_a_model_that_was_made_here_has_no_tokenizer_for_grammars() -> None:
    with pytest.raises(GrammarUnavailable):
        grammar_tokenizer(None, vocabulary=8, end_tokens=[0])


TEXTS = ["the the\n  the 1234", "<|im_start|>user\nZähler 弁 \x02 it's<|im_end|>\n", "   \n\n t", "", "hht het"]


@pytest.mark.models
def test_a_gguf_reads_text_as_llama_cpp_does() -> None:
    file = GgufTarget(prepared("Q4_0.gguf"), vocabulary_only=True)
    for text in [*TEXTS, Path("README.md").read_text(encoding="utf-8")]:
        assert GgufTokenizer(file.path).encode(text) == list(file.encode(text, special=True)), text
    file.close()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tiny_gguf_reads_text_and_spells_tokens_as_llama_cpp_does(kind: str, tmp_path: Path) -> None:
    # "the" is "t" and "he", since "he" has the better score.
    pairs = [(word, TokenType.NORMAL) for word in ("he", "th")]
    rows = [*sentencepiece_rows(), *pairs] if kind == "llama" else None
    path = tiny_gguf(tmp_path / "tiny.gguf", rows=rows, tokenizer=kind)
    file = GgufTarget(path, vocabulary_only=True)
    for text in TEXTS:
        assert GgufTokenizer(path).encode(text) == list(file.encode(text, special=True)), text
    ours = grammar_tokenizer(path, vocabulary=file.vocabulary.size, end_tokens=file.end_tokens)
    assert ours.pieces == file.grammar_tokenizer().pieces
    file.close()


def test_a_chat_format_is_read_from_a_gguf_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    model = GgufModel(path, vocabulary_only=True)
    found = chat_format(path, [7, 3])
    assert found is not None
    assert (found.template, found.bos, found.eos) == (
        model.chat_template, model.special_text("bos"), model.special_text("eos")
    )  # fmt: skip
    assert found.end_tokens == (3, 7)
    model.close()


@pytest.mark.parametrize(
    ("config", "alone", "expected"),
    [
        ({"chat_template": "a", "bos_token": {"content": "<b>"}, "eos_token": "<e>"}, None, ("a", "<b>", "<e>")),
        ({"chat_template": "a", "bos_token": None}, "b", ("b", "", "")),
        (
            {"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]},
            None,
            ("b", "", ""),
        ),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, None, None),
        ({}, None, None),
        (None, None, None),
        (None, "c", ("c", "", "")),
    ],
)
def test_a_chat_format_is_read_from_a_folder(
    tmp_path: Path, config: dict[str, Any] | None, alone: str | None, expected: tuple[str, str, str] | None
) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if alone is not None:
        (tmp_path / "chat_template.jinja").write_text(alone)
    found = chat_format(tmp_path, ())
    assert (found and (found.template, found.bos, found.eos)) == expected


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"chat_template": 5}',
             '{"chat_template": "a", "bos_token": {"a": 1}}', '{"chat_template": [1]}',
             json.dumps({"chat_template": "a" * (1 << 18)})],
)  # fmt: skip
def test_a_damaged_chat_format_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UnsupportedModel):
        chat_format(tmp_path, ())
