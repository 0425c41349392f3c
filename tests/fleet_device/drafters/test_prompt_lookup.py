"""Prompt lookup: which earlier place wins, and when there is none."""

from pathlib import Path

import pytest

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.without_model import Lookup, PromptLookupDrafter, WordCodec
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.tiny_gguf import tiny_gguf, tiny_words

WORDS = tuple("abcdefghij")
POLICY = SamplingPolicy(seed=1)


def guess(text: str, lookup: Lookup | None = None) -> str | None:
    """Return the word proposed after a text of one-letter words."""
    codec = WordCodec(WORDS)
    drafter = PromptLookupDrafter(Vocabulary.of(WORDS), codec, lookup)
    drafter.reset(codec.encode(" ".join(text)))
    dist = drafter.next(POLICY)
    if dist is None:
        return None
    assert dist.probs.tolist() == [1.0]
    return WORDS[int(dist.ids[0])]


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
    codec = WordCodec(WORDS)
    drafter = PromptLookupDrafter(Vocabulary.of(WORDS), codec)
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
