from pathlib import Path

import pytest

from fleet_common.grammar.compiler import compile_grammar
from fleet_common.grammar.errors import GrammarUnavailable
from fleet_edge.verifiers.llama_cpp.slab import GgufTarget
from fleet_edge.verifiers.tokens import grammar_tokenizer
from schemas.policy import Grammar

MODELS = Path("models/smollm2-135m")
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
    file = GgufTarget(MODELS / "Q4_0.gguf", vocabulary_only=True)
    of_file = compile_grammar(SCHEMA, file.grammar_tokenizer())
    tokens = grammar_tokenizer(MODELS / "target", vocabulary=file.vocabulary.size, end_tokens=file.end_tokens)
    of_folder = compile_grammar(SCHEMA, tokens)
    text: list[int] = []
    while text[-1:] != [file.end_tokens[0]] and len(text) < 40:
        assert of_file.forced(text) == of_folder.forced(text)
        allowed = of_file.allowed(text)
        assert allowed.tolist() == of_folder.allowed(text).tolist()
        text.append(int(allowed[len(allowed) // 2]) if len(text) < 24 else int(allowed[0]))
    file.close()


def test_a_model_that_was_made_here_has_no_tokenizer_for_grammars() -> None:
    with pytest.raises(GrammarUnavailable, match="loaded"):
        grammar_tokenizer(None, vocabulary=8, end_tokens=[0])
