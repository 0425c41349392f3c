"""Tokens of two vocabularies are common if they stand for the same bytes, however their files spell them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from gguf import TokenType

from dssd.distribution import Dist
from fleet_device.drafters.model_file import GgufModel
from fleet_device.drafters.unlike import NONE, CommonTokens, turn_begin, turn_end
from tests.support.tiny_gguf import Row, sentencepiece_rows, tiny_gguf, tiny_rows


@dataclass(frozen=True)
class Codec:
    """Text side of a vocabulary that is given by its tokens' bytes; control tokens, which have none, by their texts."""

    pieces: Sequence[bytes]
    control: dict[str, int] = field(default_factory=dict)
    end_tokens: tuple[int, ...] = ()
    chat_template: str | None = None
    eos: str = ""

    @property
    def control_texts(self) -> tuple[str, ...]:
        return tuple(self.control)

    def special_text(self, name: str) -> str:
        return self.eos if name == "eos" else ""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if special and text in self.control:
            return [self.control[text]]
        return [self.pieces.index(text[place : place + 1].encode()) for place in range(len(text))]

    def piece(self, token: int) -> bytes:
        return self.pieces[token]


def common(draft: Codec, target: Codec) -> CommonTokens:
    return CommonTokens(draft, len(draft.pieces), target, len(target.pieces))


PLAIN = Codec([b"a", b"b", b" the", b"\xe2\x82"])


def test_tokens_of_the_same_bytes_are_common_and_no_others() -> None:
    found = common(PLAIN, Codec([b"the", b" the", b"\xe2", b"a", b"\xe2\x82", b"A"]))
    assert found.to_target.tolist() == [3, NONE, 1, 4]
    assert (found.count, found.overlap) == (3, 0.75)


def test_control_tokens_are_not_common_even_if_they_read_alike() -> None:
    draft = Codec([b"", b"a", b"b"], {"<x>": 0})
    target = Codec([b"a", b"", b"b"], {"<x>": 1})
    assert common(draft, target).to_target.tolist() == [NONE, 0, 2]


def test_of_several_tokens_of_the_same_bytes_the_one_that_is_written_counts() -> None:
    twice = Codec([b"b", b"a", b"a"])  # encode finds the first
    assert common(PLAIN, twice).to_target.tolist() == [1, 0, NONE, NONE]
    assert common(twice, PLAIN).to_target.tolist() == [1, 0, NONE]


CHAT = "{% for m in messages %}<|im_start|>{{ m }}<|im_end|>{% endfor %}"
ENDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def test_ends_correspond_by_their_role_and_not_by_their_order() -> None:
    draft = Codec([b"", b"", b"", b"a"], ENDS, (0, 2), CHAT, "<|im_end|>")
    target = Codec([b"a", b"", b""], {"<eos>": 1, "<end_of_turn>": 2}, (1, 2), "{{ m }}<end_of_turn>", "<eos>")
    found = common(draft, target)
    assert found.to_target.tolist() == [1, NONE, 2, 0]
    assert dict(found.ends()) == {2: 2, 1: 0}
    assert dict(common(target, draft).ends()) == {2: 2, 0: 1}


def test_an_end_without_a_counterpart_is_not_common() -> None:
    draft = Codec([b"", b"", b"", b"a"], ENDS, (0, 2), CHAT)
    target = Codec([b"a", b""], {"</s>": 1}, (1,), None, "</s>")
    assert common(draft, target).to_target.tolist() == [NONE, NONE, 1, 0]
    assert common(draft, Codec([b"a", b"b"])).to_target.tolist() == [NONE, NONE, NONE, 0]


def test_an_end_that_has_bytes_is_an_end_all_the_same() -> None:
    target = Codec([b"a", b"</s>"], {}, (1,))
    assert common(Codec([b"</s>", b"a"]), target).to_target.tolist() == [NONE, 0]


@pytest.mark.parametrize("text", ["<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|end|>"])
def test_usual_ends_of_turns_are_known_without_a_template(text: str) -> None:
    assert turn_end(Codec([b"a", b"", b""], {"<eos>": 1, text: 2}, (1, 2), None, "<eos>")) == 2


def test_what_begins_a_turn_is_read_off_the_template() -> None:
    assert turn_begin(Codec([b"", b"", b"", b"a"], ENDS, (0, 2), CHAT)) == 1
    assert turn_begin(Codec([b"", b"", b"", b"a"], ENDS, (0, 2), "{{ m }}<|im_end|>")) == NONE


def test_a_restricted_distribution_is_whole_ordered_and_over_the_targets_ids() -> None:
    found = common(PLAIN, Codec([b"the", b" the", b"\xe2", b"a", b"\xe2\x82"]))  # 0 -> 3, 2 -> 1, 3 -> 4
    dist = found.restrict(Dist(np.array([1, 3, 0, 2]), np.array([0.5, 0.25, 0.125, 0.125])))
    assert dist is not None
    assert dist.ids.tolist() == [4, 1, 3]
    assert dist.probs.tolist() == [0.5, 0.25, 0.25]
    assert found.restrict(Dist(np.array([1]), np.ones(1))) is None


def test_byte_level_and_sentencepiece_files_are_compared_by_bytes(tmp_path: Path) -> None:
    word: list[Row] = [("\u0120the", TokenType.NORMAL), ("\u00c3\u00a9", TokenType.NORMAL)]
    draft = GgufModel(tiny_gguf(tmp_path / "a.gguf", rows=[*tiny_rows(), *word]), vocabulary_only=True)
    more: list[Row] = [
        ("\u2581the", TokenType.NORMAL),
        ("\u00e9", TokenType.NORMAL),
        ("<unused0>", TokenType.UNUSED),
        ("  ", TokenType.USER_DEFINED),
    ]
    target = GgufModel(
        tiny_gguf(tmp_path / "b.gguf", rows=[*sentencepiece_rows(), *more], tokenizer="llama"), vocabulary_only=True
    )
    try:
        found = CommonTokens(draft, draft.vocabulary.size, target, target.vocabulary.size)
        pieces = {draft.piece(own): target.piece(int(other)) for own, other in enumerate(found.to_target) if other >= 0}
        pieces.pop(b"", None)  # ends
        assert all(own == other for own, other in pieces.items())
        assert {b" the", "\u00e9".encode(), b"\xff", b" ", b"t"} <= pieces.keys()
        assert b"th" not in pieces
        first = len(sentencepiece_rows())
        assert found.to_target[len(tiny_rows())] == first
        # A printable byte has two tokens in the target; the character is what its tokenizer writes.
        assert found.to_target[draft.encode("t")[-1]] > 258
    finally:
        draft.close()
        target.close()
