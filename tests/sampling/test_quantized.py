import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sampling.distribution import TOTAL, Dist, draw_draft, quantize
from tests.support.reference import quantized

WEIGHTS = st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=40)


def dist_of(weights: list[float]) -> Dist:
    probs = np.sort(np.array(weights))[::-1]
    probs = (probs / probs.sum()).astype(np.float32).astype(np.float64)
    probs = probs[probs > 0]
    return Dist(np.arange(100, 100 + len(probs)), probs)


@given(WEIGHTS)
@settings(max_examples=300, deadline=None)
def test_counts_sum_to_the_total_and_are_the_largest_remainders(weights: list[float]) -> None:
    dist = dist_of(weights)
    quantized = quantize(dist)
    assert quantized.counts.sum() == TOTAL
    assert (quantized.counts >= 1).all()
    exact = dist.probs / dist.probs.sum() * TOTAL
    counts = np.array([quantized.count(token) for token in dist.ids])
    below = np.floor(exact + 1e-6)  # floats may miss a whole number from below
    up = counts > below
    assert (np.abs(counts - exact) < 1 + 1e-6).all()
    if up.any() and not up.all():
        # No token is rounded up with a smaller remainder than one that is rounded down.
        remainder = exact - below
        assert remainder[up].min() >= remainder[~up].max() - 1e-6


def test_a_vocabulary_larger_than_the_total_of_counts_is_quantized_too() -> None:
    size = 3 * TOTAL
    quantized = quantize(Dist(np.arange(size), np.full(size, 1.0 / size)))
    assert quantized.counts.sum() == TOTAL
    assert len(quantized.ids) == TOTAL
    assert quantized.ids.max() == TOTAL - 1  # ties go to those that come first


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("levels", [3, 1_000_000])
def test_a_large_distribution_is_rounded_as_by_a_sort_of_all_remainders(spread: float, levels: int) -> None:
    random = np.random.default_rng(levels)
    weights = np.exp(np.round(spread * random.standard_normal(50_000) * levels) / levels)
    probs = (weights / weights.sum()).astype(np.float32).astype(np.float64)
    ids = random.permutation(100_000)[: len(probs)]
    exact = probs * (TOTAL / probs.sum())
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: TOTAL - counts.sum()]] += 1
    quantized = quantize(Dist(ids, probs))
    assert quantized.ids.tolist() == ids[counts > 0].tolist()
    assert quantized.counts.tolist() == counts[counts > 0].tolist()


@given(WEIGHTS)
@settings(max_examples=20, deadline=None)
def test_a_token_is_drawn_by_exactly_as_many_values_as_its_count(weights: list[float]) -> None:
    quantized = quantize(dist_of(weights))
    for token, count in zip(quantized.ids, quantized.counts, strict=True):
        start = int(quantized.counts[: quantized.ids.tolist().index(token)].sum())
        for value in (start, start + int(count) - 1):
            assert draw_draft(quantized, value / TOTAL) == (token, count)
            assert draw_draft(quantized, (value + 1) / TOTAL - 2.0**-53) == (token, count)


def test_every_unit_of_the_counts_is_drawn_once() -> None:
    quantized = quantize(dist_of([0.5, 0.3, 0.15, 0.05]))
    drawn = [draw_draft(quantized, value / TOTAL) for value in range(TOTAL)]
    for token, count in zip(quantized.ids.tolist(), quantized.counts.tolist(), strict=True):
        assert drawn.count((token, count)) == count


def test_probabilities_are_the_counts_and_zero_outside_the_support() -> None:
    quantized = quantize(Dist(np.array([9, 2, 5]), np.array([0.5, 0.25, 0.25])))
    assert quantized.probabilities(np.array([5, 7, 9, 0, 11])).tolist() == [0.25, 0.0, 0.5, 0.0, 0.0]
    assert (quantized.count(9), quantized.count(7)) == (TOTAL // 2, 0)


def test_counts_equal_those_of_exact_fractions() -> None:
    random = np.random.default_rng(2)
    for size in (1, 2, 7, 50, 1000):
        dist = dist_of(random.exponential(size=size).tolist())
        found = quantize(dist)
        expected = quantized(dict(zip(dist.ids.tolist(), dist.probs.tolist(), strict=True)))
        assert dict(zip(found.ids.tolist(), found.counts.tolist(), strict=True)) == expected
