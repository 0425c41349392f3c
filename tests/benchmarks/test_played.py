import time

import pytest

from fleet_edge.step_curve import StepCurve
from fleet_edge.verifiers.contract import Item
from tests.support.markov import MarkovScript
from tests.support.played_steps import play, step_s
from tests.support.scripted_verifier import ScriptedVerifier

CURVE = StepCurve(rows={1: ((1, 10), (5, 30)), 2: ((1, 12), (5, 50))}, prefill=((1, 10), (101, 110)))


@pytest.mark.parametrize(
    ("sizes", "expected_s"),
    [
        ([(1, 1)], 0.010),
        ([(5, 5), (5, 5)], 0.050),
        ([(101, 0)], 0.110),
        ([(5, 5), (101, 0)], 0.130),
    ],
    ids=["edge-only", "two drafts", "prompt", "draft and prompt"],
)
def test_a_step_takes_as_long_as_its_drafts_and_prompts(sizes: list[tuple[int, int]], expected_s: float) -> None:
    items = [Item(key, range(tokens), rows, stable=False) for key, (tokens, rows) in enumerate(sizes)]
    assert step_s(CURVE, items) == pytest.approx(expected_s)


def test_played_steps_have_the_rows_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    script = MarkovScript(size=16, seed=1)
    verifiers = [ScriptedVerifier(script, [f"w{n}" for n in range(16)]) for _ in range(2)]
    for verifier in verifiers:
        verifier.open(1)
    plain, played = verifiers[0], play(verifiers[1], StepCurve(rows={1: ((1, 3_000_000),)}))
    item = Item(1, (1, 2, 3), 2, stable=False)
    assert (played.score([item]) == plain.score([item])).all()
    assert slept == [pytest.approx(6000.0, abs=600.0)]
