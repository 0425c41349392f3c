import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from sampling.drawing import Purpose, gumbel, random_uniform, random_uniforms
from tests.support.statistics import ALARM

SEED = st.integers(0, 2**64 - 1)
POSITION = st.integers(0, 2**20)
INDEX = st.integers(0, 2**21)
DRAWS = np.arange(100_000)
LATE = range(2**16 - 10_000, 2**16 + 10_000)


@given(SEED, POSITION, st.sampled_from(Purpose), st.lists(INDEX, min_size=1, max_size=5))
@settings(deadline=None)
def test_a_batch_of_random_numbers_equals_them_one_by_one(
    seed: int, position: int, purpose: Purpose, indices: list[int]
) -> None:
    together = random_uniforms(seed, position, purpose, np.array(indices))
    assert together.tolist() == [random_uniform(seed, position, purpose, index) for index in indices]
    assert ((together >= 0.0) & (together < 1.0)).all()


def test_the_random_numbers_do_not_change_between_releases() -> None:
    """Both ends of a session may run different releases, and must draw the same numbers."""
    found = [
        random_uniform(0, 0, Purpose.DRAFT),
        random_uniform(1, 2, Purpose.ACCEPT, 3),
        random_uniform(2**64 - 1, 2**20, Purpose.GUMBEL, 2**21),
    ]
    assert found == [0.13870941014555427, 0.48283671219926527, 0.6724242491485671]


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("along", ["seed", "position", "index"])
def test_random_numbers_are_uniform_along_every_coordinate(purpose: Purpose, along: str) -> None:
    """Chi-square over 256 cells; 21 assertions, each false once in 10,000 seeds."""
    if along == "index":
        values = random_uniforms(11, 5, purpose, DRAWS)
    elif along == "seed":
        values = np.array([random_uniform(seed, 5, purpose) for seed in range(20_000)])
    else:
        values = np.array([random_uniform(11, position, purpose) for position in LATE])
    counts = np.histogram(values, bins=256, range=(0.0, 1.0))[0]
    assert stats.chisquare(counts).pvalue > ALARM


@pytest.mark.parametrize("other", [p for p in Purpose if p is not Purpose.ACCEPT])
def test_random_numbers_of_different_purposes_are_independent(other: Purpose) -> None:
    """Chi-square of the joint law over 16 x 16 cells, at one position and along positions; 12 assertions."""
    at_one = random_uniforms(3, 9, Purpose.ACCEPT, DRAWS), random_uniforms(3, 9, other, DRAWS)
    along = tuple(
        np.array([random_uniform(3, position, purpose) for position in range(20_000)])
        for purpose in (Purpose.ACCEPT, other)
    )
    for left, right in (at_one, along):
        counts = np.histogram2d(left, right, bins=16, range=((0, 1), (0, 1)))[0]
        assert stats.chisquare(counts.ravel()).pvalue > ALARM


def test_random_numbers_of_neighbouring_counters_are_independent() -> None:
    """Numbers of neighbouring positions and of neighbouring seeds; 2 assertions at 1 in 10,000."""
    for values in (
        np.array([random_uniform(3, position, Purpose.DRAFT) for position in range(40_001)]),
        np.array([random_uniform(seed, 3, Purpose.DRAFT) for seed in range(40_001)]),
    ):
        counts = np.histogram2d(values[:-1], values[1:], bins=16, range=((0, 1), (0, 1)))[0]
        assert stats.chisquare(counts.ravel()).pvalue > ALARM


def test_gumbel_noise_has_the_gumbel_law() -> None:
    """Kolmogorov-Smirnov over 100,000 tokens, false once in 10,000 seeds."""
    noise = gumbel(5, 7, DRAWS)
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > ALARM


def test_gumbel_noise_is_finite_at_both_ends_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (0.0, 1.0 - 2.0**-53):
        monkeypatch.setattr("sampling.drawing.random_uniforms", lambda *_, end=end: np.array([end]))
        assert np.isfinite(gumbel(0, 0, np.array([0]))).all()
