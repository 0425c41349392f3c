"""The scripted drafter: the script's law, shaped."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.without_model import ScriptedDrafter, WordCodec
from fleet_device.requests.generate import Detokenizer
from schemas.policy import SamplingPolicy
from tests.support.markov import MarkovScript

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
