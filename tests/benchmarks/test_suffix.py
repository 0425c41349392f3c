from typing import Any

import pytest

from benchmarks.applications.suffix import QUESTIONS, ratio, report_prompt


def written(way: str, number: int, seconds: float) -> dict[str, Any]:
    return {"texts": "reports", "number": number, "way": way, "tokens": 60, "seconds": seconds}


def test_the_ratio_is_of_the_tokens_a_second_of_all_texts() -> None:
    both = "model and suffix"
    texts = [written(way, number, seconds) for number in range(20) for way, seconds in (("model", 3.0), (both, 2.0))]
    assert ratio(texts, both) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio(texts, "model") == pytest.approx((1.0, 1.0, 1.0))
    texts[1] = written(both, 0, 20.0)
    middle, low, high = ratio(texts, both)
    assert low < middle < high


def test_reports_have_one_form_and_questions_differ() -> None:
    assert len({report_prompt(number) for number in range(100)}) == 100
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 48
