import pytest

from fleet_edge.verifiers.contract import Item, VerifierError
from fleet_edge.verifiers.scripted import ScriptedVerifier
from tests.support.markov import MarkovScript


def test_a_script_of_another_vocabulary_is_refused() -> None:
    verifier = ScriptedVerifier(MarkovScript(size=9, seed=1), [f"t{index}" for index in range(8)])
    verifier.open(1)
    with pytest.raises(VerifierError, match=r"shape \(1, 9\) where \(1, 8\)"):
        verifier.score([Item(1, [1], 1)])
