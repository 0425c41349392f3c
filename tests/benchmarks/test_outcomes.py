"""Drafting ahead for several outcomes: what it would bring, reckoned from above."""

import pytest

from benchmarks.outcomes import SECOND, main, reckon
from fleet_device.pacing.contract import Plan
from fleet_device.pacing.throughput import Conditions


def conditions(*, acceptance: float = 0.72, token_s: float = 0.013, step_s: float = 0.1) -> Conditions:
    return Conditions(acceptance=acceptance, token_s=token_s, beside_s=0.02, compute_s=step_s, window=4)


def test_where_nothing_can_be_prepared_it_is_waiting_for_each_verdict() -> None:
    slow = conditions(token_s=1.0)
    found = reckon(slow, second=SECOND)
    assert found.likely == 0.0
    assert found.outcomes == pytest.approx(max(slow.rate(Plan(tokens)) for tokens in range(1, 13)))


def test_the_more_often_the_second_choice_is_right_the_better_it_is() -> None:
    rates = [reckon(conditions(), second=second).outcomes for second in (0.0, 0.43, 1.0)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_it_brings_no_more_than_a_twentieth_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/formulas.md says of it; were it more, it would be worth building."""
    assert main([]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    gains = [float(row.split(";")[1]) for row in rows]
    assert len(gains) == 40
    assert max(gains) == 1.04
