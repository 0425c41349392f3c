"""A GGUF's vocabulary and text side."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf import TokenType

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.model_file import GgufModel
from fleet_device.requests.generate import Detokenizer
from schemas.vocabulary import Vocabulary
from tests.support.prepared_models import prepared
from tests.support.tiny_gguf import CHAT_TEMPLATE, END, PADDING, tiny_gguf, tiny_rows, tiny_words


@pytest.fixture(params=[False, True], ids=["weights", "vocabulary only"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GgufModel]:
    model = GgufModel(tiny_gguf(tmp_path / "tiny.gguf"), vocabulary_only=request.param)
    yield model
    model.close()
    model.close()


def test_the_fingerprint_is_over_the_token_strings_without_padding(model: GgufModel) -> None:
    assert model.vocabulary == Vocabulary.of(tiny_words())
    assert model.rows == len(tiny_words()) + PADDING


def test_a_token_that_is_not_used_is_a_token(tmp_path: Path) -> None:
    """llama.cpp marks rows as unused that every file of the family has, edges' files too."""
    names = ("<unused0>", "<unused1>")
    for kind in (TokenType.CONTROL, TokenType.UNUSED):
        path = tiny_gguf(tmp_path / "tiny.gguf", rows=[*tiny_rows(), *((name, kind) for name in names)])
        model = GgufModel(path, vocabulary_only=True)
        assert model.vocabulary == Vocabulary.of([*tiny_words(), *names])
        model.close()


def test_a_file_of_nothing_but_padding_is_refused(tmp_path: Path) -> None:
    rows = [("a", TokenType.NORMAL), *((f"[PAD{index}]", TokenType.UNUSED) for index in range(1, 9))]
    path = tiny_gguf(tmp_path / "tiny.gguf", rows=rows)
    with pytest.raises(DrafterError, match="no vocabulary but padding"):
        GgufModel(path, vocabulary_only=True)


def test_plain_text_never_becomes_a_control_token(model: GgufModel) -> None:
    assert END not in model.encode("a <|im_end|> b")
    assert END in model.encode("a <|im_end|> b", special=True)


@pytest.mark.parametrize(
    "text", ["the thread", "naïve — 東京 😀\n\n\tx", "", "\x00\x01", "a\ud800b", "a" * 20_000, " " * 20_000]
)
def test_text_survives_the_round_trip(model: GgufModel, text: str) -> None:
    expected = text.encode("utf-8", "replace")
    assert b"".join(map(model.piece, model.encode(text))) == expected


def test_control_tokens_have_no_text(model: GgufModel) -> None:
    assert model.piece(END) == b""
    assert model.special_text("eos") == "<|im_end|>"
    assert model.special_text("bos") == "<|im_start|>"
    assert END in model.end_tokens


def test_a_token_outside_the_vocabulary_has_no_piece(model: GgufModel) -> None:
    for wrong in (-1, model.vocabulary.size):
        with pytest.raises(DrafterError, match="outside the vocabulary"):
            model.piece(wrong)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.encode("a"),
        lambda model: model.piece(5),
        lambda model: model.end_tokens,
        lambda model: model.chat_template,
        lambda model: model.special_text("eos"),
        lambda model: model.quantization,
    ],
)
def test_a_closed_model_says_so(model: GgufModel, use: Callable[[GgufModel], object]) -> None:
    model.close()
    with pytest.raises(DrafterError, match="is closed"):
        use(model)


def test_the_chat_template_is_the_file_s(model: GgufModel) -> None:
    assert model.chat_template == CHAT_TEMPLATE


def test_a_stream_never_gives_half_a_character(model: GgufModel) -> None:
    text = "é東😀 the"
    stream = Detokenizer(model)
    parts = [stream.feed([token]) for token in model.encode(text)]
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


def test_a_character_that_never_gets_whole_is_not_given(model: GgufModel) -> None:
    assert Detokenizer(model).feed([*model.encode("a"), *model.encode("😀")[:3]]) == "a"


def test_a_broken_character_does_not_hold_up_the_text(model: GgufModel) -> None:
    stream = Detokenizer(model)
    assert stream.feed([*model.encode("😀")[:2], *model.encode("a")]) == "\ufffda"


@pytest.mark.models
def test_the_target_s_tokenizer_has_the_draft_s_fingerprint_and_ids() -> None:
    transformers = pytest.importorskip("transformers")
    target = prepared("target")
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    model = GgufModel(prepared("Q4_0.gguf"), vocabulary_only=True)
    strings = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert Vocabulary.of(strings) == model.vocabulary
    assert str(model.vocabulary) == "49152 tokens, 26138422"  # as every release has had it
    for text in ("It's 12345 o'clock.", "  a\n\n\tb", "naïve 東京 😀", "def f(x):\n    return x**2"):
        assert model.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    model.close()
