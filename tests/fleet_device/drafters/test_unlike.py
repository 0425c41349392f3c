import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from numpy.typing import NDArray

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.model_file import GgufModel, load_drafter
from fleet_device.drafters.unlike import NONE, CommonTokens, UnlikeVocabularyDrafter, turn_begin, turn_end
from fleet_device.drafters.without_model import ScriptedDrafter, WordCodec
from fleet_device.settings import DeviceSettings
from sampling.distribution import Dist
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.tiny_gguf import Row, sentencepiece_rows, tiny_gguf, tiny_rows

POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)
DRAFT = ("end", "a", "b", "x")
TARGET = ("c", "b", "stop", "a", "d")  # in common: a, b, and the ends


class Fixed:
    def __init__(self, logits: Sequence[float] = (0.0, 0.0, 0.0, 0.0)) -> None:
        self.read: list[int] = []
        self._logits = np.array(logits)

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        self.read = list(prefix)
        return self._logits


def make(script: Fixed, *, context: int = 64) -> UnlikeVocabularyDrafter:
    inner = ScriptedDrafter(script, DRAFT, end_tokens=(0,), context=context, name="small")
    return UnlikeVocabularyDrafter(inner, Vocabulary.of(TARGET), WordCodec(TARGET, (2,)))


def test_what_is_drafted_are_common_tokens_under_the_targets_ids() -> None:
    drafter = make(Fixed(np.log([0.1, 0.2, 0.3, 0.4]).tolist()))
    drafter.reset([3])
    dist = drafter.next(POLICY)
    assert dist.ids.tolist() == [1, 3, 2]
    assert dist.probs == pytest.approx([0.5, 1 / 3, 1 / 6], abs=1e-6)
    assert drafter.vocabulary == Vocabulary.of(TARGET)
    assert drafter.codec.encode("c d") == [0, 4]


def test_where_only_other_tokens_are_likely_nothing_is_drafted() -> None:
    drafter = make(Fixed([0.0, 0.0, 0.0, 5.0]))
    drafter.reset([3])
    assert drafter.next(POLICY.model_copy(update={"temperature": 0.0})) is None


def test_what_the_draft_model_reads_are_the_common_tokens_and_the_ends() -> None:
    script = Fixed()
    drafter = make(script)
    drafter.reset([3, 0, 1, 2, 4, 3])
    drafter.next(POLICY)
    assert script.read == [1, 2, 0, 1]
    drafter.truncate(3)
    drafter.extend([1])
    drafter.next(POLICY)
    assert script.read == [1, 2, 2]


def test_a_text_of_which_the_draft_model_can_read_nothing_is_left_to_the_target() -> None:
    drafter = make(Fixed())
    drafter.reset([0, 4, 4])
    assert drafter.next(POLICY) is None


def test_a_context_that_the_draft_models_own_tokens_fill_is_left_to_the_target(tmp_path: Path) -> None:
    """A target token may become many draft tokens."""
    drafter, codec = bytes_pair(tmp_path)
    drafter.reset([id_of(codec, b" the")] * 40)
    assert len(drafter.draft_tokens()) == 80 > drafter.context
    assert drafter.next(POLICY) is None
    drafter.truncate(4)
    assert drafter.next(POLICY) is not None
    drafter.close()


def bytes_pair(folder: Path) -> tuple[UnlikeVocabularyDrafter, GgufModel]:
    tiny_gguf(folder / "draft.gguf")
    words: list[Row] = [
        (word, TokenType.NORMAL) for word in ("\u2581the", "\u2581th", "he", "th", "\u20ac", "\u2581\u2581")
    ]
    path = tiny_gguf(folder / "target.gguf", rows=[*sentencepiece_rows(), *words], tokenizer="llama")
    drafter = load_drafter(DeviceSettings(model=str(folder / "draft.gguf"), context=64, target_vocabulary=path))
    assert isinstance(drafter, UnlikeVocabularyDrafter)
    assert isinstance(drafter.codec, GgufModel)
    return drafter, drafter.codec


def id_of(codec: GgufModel, piece: bytes) -> int:
    return next(token for token in range(codec.vocabulary.size) if codec.piece(token) == piece)


def test_what_is_read_has_the_texts_bytes_whatever_happened_before(tmp_path: Path) -> None:
    drafter, codec = bytes_pair(tmp_path)
    draft = GgufModel(tmp_path / "draft.gguf", vocabulary_only=True)
    random.seed(3)
    plain = [token for token in range(codec.vocabulary.size) if codec.piece(token)]
    fresh, _ = bytes_pair(tmp_path)
    tokens: list[int] = []
    for _ in range(300):
        if random.random() < 0.5 or not tokens:
            more = random.choices([*plain[256:], *random.sample(plain, 8)], k=random.randint(1, 30))
            tokens += more
            drafter.extend(more)
        else:
            del tokens[random.randrange(len(tokens)) :]
            drafter.truncate(len(tokens))
        assert b"".join(map(draft.piece, drafter.draft_tokens())) == b"".join(map(codec.piece, tokens))
        fresh.reset([])
        fresh.reset(tokens)
        assert fresh.draft_tokens() == drafter.draft_tokens()
    for each in (drafter, fresh, draft):
        each.close()


def test_neighbours_that_only_the_target_has_are_read_together(tmp_path: Path) -> None:
    """The draft model, which has neither ` t` nor `he`, reads them as a space and `the`."""
    drafter, codec = bytes_pair(tmp_path)
    draft = GgufModel(tmp_path / "draft.gguf", vocabulary_only=True)
    drafter.reset([id_of(codec, b" t"), id_of(codec, b"he")])
    assert [draft.piece(token) for token in drafter.draft_tokens()] == [b" ", b"the"]
    drafter.truncate(1)
    assert [draft.piece(token) for token in drafter.draft_tokens()] == [b" ", b"t"]
    drafter.close()
    draft.close()


def test_a_pair_with_too_little_in_common_is_refused_with_the_figure() -> None:
    words = [f"w{index}" for index in range(50)]
    others = [*(f"v{index}" for index in range(45)), *words[:5]]
    with pytest.raises(DrafterError, match="10%"):
        UnlikeVocabularyDrafter(ScriptedDrafter(Fixed(), words), Vocabulary.of(others), WordCodec(others))


@dataclass(frozen=True)
class Codec:
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


@pytest.mark.parametrize("text", ["<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|end|>"])
def test_usual_ends_of_turns_are_known_without_a_template(text: str) -> None:
    assert turn_end(Codec([b"a", b"", b""], {"<eos>": 1, text: 2}, (1, 2), None, "<eos>")) == 2


def test_what_begins_a_turn_is_read_off_the_template() -> None:
    assert turn_begin(Codec([b"", b"", b"", b"a"], ENDS, (0, 2), CHAT)) == 1
    assert turn_begin(Codec([b"", b"", b"", b"a"], ENDS, (0, 2), "{{ m }}<|im_end|>")) == NONE


def test_a_restricted_distribution_is_whole_ordered_and_over_the_targets_ids() -> None:
    found = common(PLAIN, Codec([b"the", b" the", b"\xe2", b"a", b"\xe2\x82"]))  # 0 -> 3, 2 -> 1, 3 -> 4
    dist = found.restrict(Dist(np.array([1, 3, 0, 2]), np.array([0.5, 0.25, 0.125, 0.125])))
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
