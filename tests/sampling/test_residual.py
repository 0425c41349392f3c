import numpy as np
import pytest
from hypothesis import given, strategies as st

from sampling.distribution import TOTAL, Dist, point_mass, quantize
from sampling.drawing import accepts, draw, residual

P = Dist(np.array([4, 1, 7]), np.array([0.5, 0.3, 0.2]))


@given(st.floats(0, 1), st.integers(1, TOTAL), st.floats(0, 1, exclude_max=True))
def test_a_token_is_accepted_with_probability_p_over_q(p: float, count: int, coin: float) -> None:
    assert accepts(p, count, coin) == (coin < p * TOTAL / count) or coin == pytest.approx(p * TOTAL / count)


@pytest.mark.parametrize("coin", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_with_p_zero_is_never_accepted_and_one_with_p_above_q_always(coin: float) -> None:
    assert not accepts(0.0, 1, coin)
    assert accepts(0.5, TOTAL // 2, coin)
    assert accepts(1.0, TOTAL, coin)


def test_the_residual_is_the_normalized_positive_part_of_p_minus_q() -> None:
    q = quantize(Dist(np.array([1, 4, 9]), np.array([0.5, 0.25, 0.25])))
    rest = residual(P, q)
    assert rest.ids.tolist() == [4, 7]
    assert rest.probs == pytest.approx([0.25 / 0.45, 0.2 / 0.45])


def test_where_p_equals_q_the_residual_is_p() -> None:
    assert residual(point_mass(3), quantize(point_mass(3))).ids.tolist() == [3]


def test_draws_invert_the_cumulated_mass() -> None:
    assert [draw(P, coin) for coin in (0.0, 0.499, 0.5, 0.799, 0.801, 1 - 2.0**-53)] == [4, 4, 1, 1, 7, 7]


@pytest.mark.parametrize("size", [4_097, 10_000, 10_240])
def test_draws_of_many_tokens_do_so_too(size: int) -> None:
    """Weights are whole numbers, so that no sum is rounded."""
    random = np.random.default_rng(size)
    weights = random.integers(1, 9, size).astype(np.float64)
    mass = np.cumsum(weights)
    dist = Dist(np.arange(size), weights)
    for coin in (0.0, 0.25, 1 - 2.0**-53, *random.random(200)):
        assert draw(dist, coin) == np.searchsorted(mass, coin * mass[-1], side="right").clip(max=size - 1)


def test_a_mass_that_is_not_quite_one_is_drawn_from_as_it_is() -> None:
    half = Dist(P.ids, P.probs / 2)
    assert [draw(half, coin) for coin in (0.49, 0.51, 0.9)] == [4, 1, 7]
    assert draw(Dist(P.ids, P.probs * (1 + 1e-7)), 1 - 2.0**-53) == 7
