import pytest

from benchmarks.latency import Row, Timed, write_together
from fleet_edge.verifiers.scripted import ScriptedVerifier
from schemas.policy import Mode
from tests.support.toy_pair import END_TOKENS, PROMPT, ToyPair, own_text, policy


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("length", [1, 3, 4])
def test_both_models_on_one_machine_write_the_targets_own_text(seed: int, length: int) -> None:
    pair = ToyPair.standard()
    verifier = ScriptedVerifier(pair.target, pair.target.words, context=256, end_tokens=END_TOKENS)
    written = write_together(
        pair.drafter(), verifier, PROMPT, policy=policy(Mode.COUPLED, seed), tokens=9, length=length, limit_s=60.0
    )
    assert list(written.text) == own_text(seed, 9)


def test_figures_are_those_of_all_texts_of_a_row() -> None:
    row = Row("dsd", "Q4_0", 1, 20.0, 10.0)
    row.texts = [Timed((1,) * 10, 0.5, 2.0, 8, 100, 20), Timed((1,) * 30, 0.7, 2.0, 24, 300, 60)]
    assert row.json()["devices"] == 1
    assert row.tokens_per_s == pytest.approx((4.0 + 12.0) / 2)
    assert row.ttft_ms == pytest.approx(600.0)
    assert (row.uplink_bytes_per_token, row.downlink_bytes_per_token) == (10.0, 2.0)
