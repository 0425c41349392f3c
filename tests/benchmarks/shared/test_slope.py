import random

import pytest

from benchmarks.shared.slope import robust_slope


def test_outliers_do_not_move_the_slope() -> None:
    points = [(float(x), 100.0 + 0.5 * x) for x in range(50)]
    for x in (3, 17, 44):
        points[x] = (float(x), 9000.0)
    slope = robust_slope(points)
    assert slope is not None
    assert slope.value == pytest.approx(0.5)
    assert slope.low <= 0.5 <= slope.high
    assert robust_slope(points[:2]) is None


def test_the_interval_holds_the_true_slope_as_often_as_it_says() -> None:
    # 300 intervals of 95 % with a fixed seed; fewer than 270 hits or all of them come once in 10^5 sets of seeds.
    rng, hits = random.Random(5), 0
    for _ in range(300):
        slope = robust_slope([(float(x), 0.2 * x + rng.gauss(0.0, 1.0)) for x in range(30)])
        assert slope is not None
        hits += slope.low <= 0.2 <= slope.high
    assert 270 <= hits < 300
