import numpy as np
import pytest

from fleet_edge.verifiers.contract import Item, VerifierError
from fleet_edge.verifiers.scripted import ScriptedVerifier
from tests.support.markov import MarkovScript


def test_rows_are_those_the_script_gives_for_each_prefix() -> None:
    script = MarkovScript(size=9, seed=1, period=4)
    verifier = ScriptedVerifier(script, script.words)
    tokens = [3, 1, 4, 1, 5, 8, 2, 6]
    verifier.open(1)
    verifier.score([Item(1, tokens[:3], 0)])
    rows = verifier.score([Item(1, tokens[3:], 4)])
    expected = np.stack([script.logits(tokens[:end]) for end in range(5, 9)])
    np.testing.assert_array_equal(rows, expected)


def test_a_script_of_another_vocabulary_is_refused() -> None:
    verifier = ScriptedVerifier(MarkovScript(size=9, seed=1), [f"t{index}" for index in range(8)])
    verifier.open(1)
    with pytest.raises(VerifierError, match=r"shape \(1, 9\) where \(1, 8\)"):
        verifier.score([Item(1, [1], 1)])
