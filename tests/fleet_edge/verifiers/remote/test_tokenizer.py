import json
from pathlib import Path

import pytest

from fleet_edge.verifiers.remote.local import load_local, readings, sample_tokens
from tests.fleet_edge.verifiers.oracle import WORDS, tokenizer


def folder(path: Path, **configs: object) -> Path:
    (path / "tokenizer.json").write_text(tokenizer(WORDS), encoding="utf-8")
    for name, content in configs.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def test_vocabulary_and_end_tokens_come_from_small_files(tmp_path: Path) -> None:
    local = load_local(str(folder(tmp_path, config={"eos_token_id": 2}, generation_config={"eos_token_id": [60, 2]})))
    assert local.strings == WORDS
    assert local.end_tokens == (2, 60)
    assert local.name == tmp_path.name


@pytest.mark.parametrize(
    ("string", "text"),
    [("Ġthe", " the"), ("ĊĊ", "\n\n"), ("Ã©", "é"), ("▁the", " the"), ("▁the", "the"), ("<|im_end|>", "<|im_end|>")],
)
def test_a_token_is_read_as_its_family_writes_it(string: str, text: str) -> None:
    assert text in readings(string)


def test_some_tokens_are_compared_that_can_be_read_and_always_the_same_ones() -> None:
    strings = [f"Ġt{number}" if number % 2 else "Ã" for number in range(500)]
    chosen = sample_tokens(strings, (4, 5))
    assert chosen == sample_tokens(strings, (4, 5))
    assert len(set(chosen)) == len(chosen) >= 24
    assert {4, 5} <= set(chosen)
    assert all(token % 2 for token in chosen if token != 4)
