"""A drafter for a target with another vocabulary: what it reads, what it drafts, and when it is refused."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from numpy.typing import NDArray

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.drafters.model_file import GgufModel, load_drafter
from fleet_device.drafters.unlike import UnlikeVocabularyDrafter
from fleet_device.drafters.without_model import ScriptedDrafter, WordCodec
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.tiny_gguf import Row, sentencepiece_rows, tiny_gguf

POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)
DRAFT = ("end", "a", "b", "x")
TARGET = ("c", "b", "stop", "a", "d")  # in common: a, b, and the ends


class Fixed:
    """The same logits for every prefix, which it keeps."""

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
    assert dist is not None
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
    """A token of the target may be many of the draft model's."""
    drafter, codec = bytes_pair(tmp_path)
    drafter.reset([id_of(codec, b" the")] * 40)
    assert len(drafter.draft_tokens()) == 80 > drafter.context
    assert drafter.next(POLICY) is None
    drafter.truncate(4)
    assert drafter.next(POLICY) is not None
    drafter.close()


def bytes_pair(folder: Path) -> tuple[UnlikeVocabularyDrafter, GgufModel]:
    """A draft model of bytes and some pairs; a target of long words, whose bytes it writes in pieces too."""
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
    """` t` and `he`, of which the draft model has neither, are read as what it has: a space, `the`."""
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
    with pytest.raises(DrafterError, match=r"5 of 50 draft tokens and 50 target tokens are common, 10% of the smaller"):
        UnlikeVocabularyDrafter(ScriptedDrafter(Fixed(), words), Vocabulary.of(others), WordCodec(others))


def test_a_vocabulary_that_is_the_draft_models_own_changes_nothing(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "one.gguf")
    drafter = load_drafter(DeviceSettings(model=str(path), target_vocabulary=path))
    assert isinstance(drafter, LlamaCppDrafter)
    drafter.close()


def test_a_vocabulary_that_is_not_there_is_said_by_its_setting(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "one.gguf")
    with pytest.raises(DrafterError, match="configuration key 'target_vocabulary'"):
        load_drafter(DeviceSettings(model=str(path), target_vocabulary=tmp_path / "none.gguf"))
