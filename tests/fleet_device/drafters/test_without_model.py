from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.without_model import Lookup, PromptLookupDrafter, ScriptedDrafter, WordCodec
from fleet_device.requests.generate import Detokenizer
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.markov import MarkovScript
from tests.support.tiny_gguf import tiny_gguf, tiny_words

WORDS = ("end", "a", "b")


class Fixed:
    def __init__(self, row: Sequence[float]) -> None:
        self.row = np.array(row)

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float64]:
        assert list(prefix) == [1, 2]
        return self.row


def drafter(row: Sequence[float]) -> ScriptedDrafter:
    made = ScriptedDrafter(Fixed(row), WORDS)
    made.reset([1, 2])
    return made


def test_the_row_is_shaped_with_the_policy() -> None:
    dist = drafter(np.log([0.2, 0.5, 0.3]).tolist()).next(SamplingPolicy(temperature=1.0, top_k=2, top_p=1.0, seed=1))
    assert dist.ids.tolist() == [1, 2]
    assert dist.probs == pytest.approx([0.625, 0.375], abs=1e-6)


def test_a_row_of_another_vocabulary_is_said() -> None:
    with pytest.raises(DrafterError, match=r"shape \(2,\) for a vocabulary of 3"):
        drafter([0.0, 1.0]).next(SamplingPolicy(seed=1))


def test_a_script_with_nan_logits_is_refused() -> None:
    with pytest.raises(DrafterError, match="nonsense"):
        drafter([0.0, float("nan"), 1.0]).next(SamplingPolicy(seed=1))


def test_words_survive_the_round_trip() -> None:
    codec = WordCodec(WORDS, (0,))
    assert codec.encode("a b end") == [1, 2, 0]
    assert Detokenizer(codec).feed([1, 2, 0]) == "a b end "
    assert codec.special_text("eos") == ""
    assert codec.chat_template is None


def test_a_word_of_another_language_is_said() -> None:
    with pytest.raises(DrafterError, match="no word 'c'"):
        WordCodec(WORDS).encode("a c")


def test_a_markov_language_drafts_by_its_own_law() -> None:
    script = MarkovScript(size=5, seed=3)
    policy = SamplingPolicy(temperature=1.0, top_k=3, top_p=1.0, seed=1)
    made = ScriptedDrafter(script, script.words)
    made.reset([2, 4])
    dist = made.next(policy)
    law = script.joint([2, 4], length=1, policy=policy)
    assert [dist.probability(token) for token in range(5)] == law.tolist()


LOOKUP_WORDS = tuple("abcdefghij")
POLICY = SamplingPolicy(seed=1)


def guess(text: str, lookup: Lookup | None = None) -> str | None:
    codec = WordCodec(LOOKUP_WORDS)
    drafter = PromptLookupDrafter(Vocabulary.of(LOOKUP_WORDS), codec, lookup)
    drafter.reset(codec.encode(" ".join(text)))
    dist = drafter.next(POLICY)
    if dist is None:
        return None
    assert dist.probs.tolist() == [1.0]
    return LOOKUP_WORDS[int(dist.ids[0])]


def test_the_tokens_that_followed_a_match_are_proposed() -> None:
    assert guess("abcdab") == "c"


def test_a_longer_match_beats_a_later_one() -> None:
    assert guess("abcdefbcgabc") == "d"


def test_of_equal_matches_the_latest_wins() -> None:
    assert guess("abcabdab") == "d"


def test_a_match_shorter_than_the_minimum_is_not_used() -> None:
    assert guess("abcdxb".replace("x", "e")) is None
    assert guess("abcdeb", Lookup(shortest=1)) == "c"


def test_without_a_match_nothing_is_proposed() -> None:
    assert guess("abcdef") is None
    assert guess("a", Lookup(shortest=1)) is None


def test_a_match_may_overlap_the_end() -> None:
    assert guess("aaa") == "a"


def test_a_match_is_compared_up_to_the_maximum_length_only() -> None:
    assert guess("abcdefabxdef".replace("x", "g") + "abcdef") == "a"
    assert guess("gabcfabchabc", Lookup(shortest=1, longest=2)) == "h"


def test_a_long_sequence_grows_the_store() -> None:
    codec = WordCodec(LOOKUP_WORDS)
    drafter = PromptLookupDrafter(Vocabulary.of(LOOKUP_WORDS), codec)
    drafter.reset([0, 1, 2])
    for _ in range(3):
        drafter.extend([5] * 1500)
    drafter.extend([0, 1])
    dist = drafter.next(POLICY)
    assert dist is not None
    assert dist.ids.tolist() == [2]


@pytest.mark.parametrize("wrong", [{"shortest": 0}, {"shortest": 5, "longest": 4}, {"context": 0}])
def test_a_lookup_that_cannot_work_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DrafterError, match="1 <= shortest <= longest"):
        Lookup(**wrong)


def test_a_gguf_gives_vocabulary_and_text(tmp_path: Path) -> None:
    drafter = PromptLookupDrafter.from_gguf(tiny_gguf(tmp_path / "tiny.gguf"))
    assert drafter.vocabulary == Vocabulary.of(tiny_words())
    drafter.reset(drafter.codec.encode("the end of the"))
    dist = drafter.next(POLICY)
    assert dist is None  # one common token is too little
    drafter.extend(drafter.codec.encode(" end of the"))
    dist = drafter.next(POLICY)
    assert dist is not None
    assert drafter.codec.piece(int(dist.ids[0])) == b" "
    drafter.close()


def test_a_bad_gguf_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match="does not exist"):
        PromptLookupDrafter.from_gguf(tmp_path / "none.gguf")
