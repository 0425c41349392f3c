import pytest

from benchmarks.suffix.command import BOTH, MODEL, Written, ratio
from benchmarks.suffix.texts import QUESTIONS, report_prompt


def written(way: str, number: int, seconds: float) -> Written:
    return Written("reports", number, way, 60, seconds, 50, 50, 40, 0, 0, 0, 0, 1.0)


def test_the_ratio_is_of_the_tokens_a_second_of_all_texts() -> None:
    texts = [written(way, number, seconds) for number in range(20) for way, seconds in ((MODEL, 3.0), (BOTH, 2.0))]
    assert ratio(texts, BOTH) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio(texts, MODEL) == pytest.approx((1.0, 1.0, 1.0))
    texts[1] = written(BOTH, 0, 20.0)
    beside, low, high = ratio(texts, BOTH)
    assert low < beside < high


def test_reports_have_one_form_and_questions_differ() -> None:
    assert len({report_prompt(number) for number in range(100)}) == 100
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 48
