import pytest

from benchmarks.fleet_load import Written, WrittenTexts, mean_pace


def test_a_devices_pace_leaves_its_prompt_out_and_the_fleets_counts_it() -> None:
    quick = Written(100.0, [(101.0, 2), (102.0, 3), (103.5, 4)])
    slow = Written(100.5, [(104.0, 1), (106.0, 2)])
    texts = WrittenTexts((quick, slow), seconds=6.0)
    assert texts.tokens == 12
    assert mean_pace([texts]) == pytest.approx((7 + 2) / (2.5 + 2.0))
    assert texts.tokens_per_s == pytest.approx(2.0)
