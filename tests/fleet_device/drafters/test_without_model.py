from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.without_model import PromptLookupDrafter, ScriptedDrafter, WordCodec, load_prompt_lookup
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
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


def test_a_row_of_another_vocabulary_is_said() -> None:
    with pytest.raises(DrafterError, match=r"shape \(2,\) for a vocabulary of 3"):
        drafter([0.0, 1.0]).next(SamplingPolicy(seed=1))


def test_a_script_with_nan_logits_is_refused() -> None:
    with pytest.raises(DrafterError, match="nonsense"):
        drafter([0.0, float("nan"), 1.0]).next(SamplingPolicy(seed=1))


def test_a_word_of_another_language_is_said() -> None:
    with pytest.raises(DrafterError, match="no word 'c'"):
        WordCodec(WORDS).encode("a c")


LOOKUP_WORDS = tuple("abcdefghij")
POLICY = SamplingPolicy(seed=1)


def lookup() -> PromptLookupDrafter:
    return PromptLookupDrafter(Vocabulary.of(LOOKUP_WORDS), WordCodec(LOOKUP_WORDS), context=1 << 17)


def guess(text: str) -> str | None:
    drafter, codec = lookup(), WordCodec(LOOKUP_WORDS)
    drafter.reset(codec.encode(" ".join(text)))
    dist = drafter.next(POLICY)
    if dist is None:
        return None
    assert dist.probs.tolist() == [1.0]
    return LOOKUP_WORDS[int(dist.ids[0])]


@pytest.mark.parametrize(
    ("text", "proposed"),
    [
        ("abcdab", "c"),
        ("abcdefbcgabc", "d"),  # a longer match beats a later one
        ("abcabdab", "d"),  # of equal matches the latest wins
        ("abcdeb", None),  # one token alone is no match
        ("abcdef", None),
        ("aaa", "a"),  # a match may overlap the end
        ("abcdefabgdefabcdef", "a"),
    ],
)
def test_what_followed_the_latest_of_the_longest_matches_is_proposed(text: str, proposed: str | None) -> None:
    assert guess(text) == proposed


def test_a_long_sequence_grows_the_store() -> None:
    drafter = lookup()
    drafter.reset([0, 1, 2])
    for _ in range(3):
        drafter.extend([5] * 1500)
    drafter.extend([0, 1])
    dist = drafter.next(POLICY)
    assert dist.ids.tolist() == [2]


def test_a_gguf_gives_vocabulary_and_text(tmp_path: Path) -> None:
    drafter = load_prompt_lookup(DeviceSettings(model=str(tiny_gguf(tmp_path / "tiny.gguf"))))
    assert drafter.vocabulary == Vocabulary.of(tiny_words())
    drafter.reset(drafter.codec.encode("the end of the"))
    dist = drafter.next(POLICY)
    assert dist is None  # one common token is too little
    drafter.extend(drafter.codec.encode(" end of the"))
    dist = drafter.next(POLICY)
    assert drafter.codec.piece(int(dist.ids[0])) == b" "
    drafter.close()
