import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fleet_bench.pacing import CHOSEN, FIXED, Column, Row, _mean, _write
from fleet_device.client.agent import Agent
from schemas.policy import SamplingPolicy


def test_the_chosen_plans_are_held_against_the_best_and_the_usual_one() -> None:
    column = Column("Q4_0", 50, {plan: Row([10, 10], [2.0, 2.0]) for plan in (*FIXED, CHOSEN)})
    column.rows[CHOSEN] = Row([10, 30], [4.0, 2.0])
    column.rows["8"] = Row([20, 20], [2.0, 2.0])
    assert column.against_usual() == pytest.approx((40 / 6) / 5)
    assert column.against_best() == pytest.approx((40 / 6) / 10)
    assert column.against_best(after=1) == pytest.approx(15 / 10)


def test_a_texts_time_runs_from_its_first_tokens_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        tokens = tuple(range(9))
        drafts = 3

        class counters:  # noqa: N801 - stands for an attribute
            drafted, tested, accepted = 12, 10, 7

    class Writer:
        def generate(self, _prompt: Sequence[int], *, on_tokens: Callable[[Sequence[int]], None], **_: Any) -> Done:
            for at_s, count in ((100.0, 2), (101.0, 3), (103.5, 4)):
                monkeypatch.setattr(time, "monotonic", lambda at_s=at_s: at_s)
                on_tokens(range(count))
            return Done()

    agent: Agent = Writer()  # type: ignore[assignment]
    row = Row()
    _write(agent, [1], SamplingPolicy(seed=1), 9, row)
    assert (row.tokens, row.seconds) == ([7], [3.5])
    assert (row.drafted, row.drafts, row.tested, row.accepted) == (12, 3, 10, 7)


def test_ratios_are_averaged_geometrically() -> None:
    assert _mean([0.5, 2.0]) == pytest.approx(1.0)
    assert _mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
