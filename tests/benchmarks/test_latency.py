import pytest

from benchmarks.latency import LatencyRow, Timed


def test_figures_are_those_of_all_texts_of_a_row() -> None:
    row = LatencyRow("dsd", "Q4_0", 1, 20.0, 10.0)
    row.texts = [Timed((1,) * 10, 0.5, 2.0, 8, 100, 20), Timed((1,) * 30, 0.7, 2.0, 24, 300, 60)]
    assert row.json()["devices"] == 1
    assert row.tokens_per_s == pytest.approx((4.0 + 12.0) / 2)
    assert row.ttft_ms == pytest.approx(600.0)
    assert (row.uplink_bytes_per_token, row.downlink_bytes_per_token) == (10.0, 2.0)
