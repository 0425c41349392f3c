import numpy as np
import pytest

from sampling.distribution import Dist, point_mass
from sampling.drawing import coupled_token, gumbel
from tests.support.statistics import ALARM, p_value

P = Dist(np.array([4, 1, 7, 2]), np.array([0.4, 0.3, 0.2, 0.1]))


def test_the_token_has_law_p_over_positions_and_over_seeds() -> None:
    """Chi-square over 20,000 draws each; 2 assertions, each false once in 10,000."""
    law = np.zeros(8)
    law[P.ids] = P.probs
    for tokens in (
        [coupled_token(P, 5, position) for position in range(20_000)],
        [coupled_token(P, seed, 5) for seed in range(20_000)],
    ):
        assert p_value(np.bincount(tokens, minlength=8), law) > ALARM


def test_the_order_of_the_support_does_not_matter() -> None:
    """Draft and target list their supports in different orders."""
    turned = Dist(P.ids[::-1].copy(), P.probs[::-1].copy())
    assert all(coupled_token(P, 1, position) == coupled_token(turned, 1, position) for position in range(500))


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_of_many_tokens_the_one_with_the_largest_sum_is_drawn(spread: float) -> None:
    weights = np.exp(spread * np.random.default_rng(1).standard_normal(40_000))
    dist = Dist(np.arange(40_000), weights / weights.sum())
    for position in range(100):
        whole = np.log(dist.probs) + gumbel(9, position, dist.ids)
        assert coupled_token(dist, 9, position) == whole.argmax()


def test_alike_distributions_mostly_draw_the_same_token() -> None:
    near = Dist(P.ids, np.array([0.38, 0.32, 0.2, 0.1]))
    same = np.mean([coupled_token(P, 1, position) == coupled_token(near, 1, position) for position in range(5_000)])
    # At least 1 - 2 TV / (1 + TV) with TV = 0.02, less four standard deviations.
    assert same > 0.96 - 4 * np.sqrt(0.96 * 0.04 / 5_000)


def test_a_distribution_with_one_token_draws_it_whatever_the_noise() -> None:
    assert coupled_token(point_mass(3), 1, 1) == 3
