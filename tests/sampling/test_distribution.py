import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from sampling.distribution import point_mass, shape
from schemas.policy import SamplingPolicy
from tests.support.reference import shaped

# Multiples of a quarter: ties are frequent, and no two masses differ by rounding alone.
LOGIT = st.integers(-40, 40).map(lambda quarter: quarter / 4) | st.just(-math.inf)
LOGITS = st.lists(LOGIT, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
POLICY = st.builds(
    SamplingPolicy,
    temperature=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from((0.1, 0.37, 0.71, 0.97, 1.0)),
)


@given(LOGITS, POLICY)
@settings(max_examples=500, deadline=None)
@example([0.0, 0.0, 0.0], SamplingPolicy(temperature=1.0, top_k=2, top_p=1.0))
@example([-math.inf, 1.0], SamplingPolicy(temperature=1.0, top_k=2, top_p=0.5))
def test_shaping_equals_a_plain_implementation(logits: list[float], policy: SamplingPolicy) -> None:
    dist = shape(np.array(logits), policy)
    expected = shaped(logits, policy)
    assert dist.ids.tolist() == list(expected)
    assert dist.probs == pytest.approx(list(expected.values()), rel=1e-6)
    assert dist.probs.sum() == pytest.approx(1.0, abs=1e-6)
    assert len(dist) == len(expected)
    # The downlink's float32 values are those used for the decision.
    assert (dist.probs.astype(np.float32) == dist.probs).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_logits_of_any_float_type_are_shaped_alike(kind: Any) -> None:
    dist = shape(np.array([1.0, 3.0, 2.0], dtype=kind), SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0))
    assert dist.probs == pytest.approx([0.0900306, 0.6652409, 0.2447285], rel=1e-3)
    assert dist.ids.tolist() == [0, 1, 2]
    assert dist.ids.dtype == np.int64
    assert dist.probs.dtype == np.float64


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        SamplingPolicy(temperature=0.7, top_k=50),
        SamplingPolicy(temperature=1.0, top_k=9_000, top_p=0.9),
        SamplingPolicy(temperature=1.0, top_k=0, top_p=0.999),
        SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0),
        SamplingPolicy(temperature=1e-300, top_k=0, top_p=1.0),
    ],
)
def test_shaping_of_a_large_vocabulary_equals_a_plain_implementation(
    policy: SamplingPolicy, *, rounded: bool, spread: float
) -> None:
    logits = spread * np.random.default_rng(3).standard_normal(20_000).astype(np.float32)
    logits = np.round(logits) if rounded else logits  # many ties
    dist, expected = shape(logits, policy), shaped(logits, policy)
    assert dist.ids.tolist() == list(expected)
    assert dist.probs == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize("policy", [SamplingPolicy(temperature=0), SamplingPolicy(top_k=2), SamplingPolicy(top_k=0)])
@pytest.mark.parametrize(
    "logits", [[0.0, math.nan, 1.0], [math.nan, math.inf], [0.0, math.inf], [-math.inf, -math.inf]], ids=repr
)
def test_logits_that_are_no_numbers_are_refused(logits: list[float], policy: SamplingPolicy) -> None:
    with pytest.raises(ValueError, match="not numbers"):
        shape(np.array(logits), policy)


def test_a_temperature_of_nearly_zero_is_nearly_greedy() -> None:
    dist = shape(np.array([1e9, -1e9, 0.0]), SamplingPolicy(temperature=5e-324, top_k=0, top_p=1.0))
    assert dist.ids.tolist() == [0]


def test_the_probability_of_a_token_outside_the_support_is_zero() -> None:
    dist = point_mass(3)
    assert (dist.probability(3), dist.probability(2)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "likely", "rare"),
    [(0, 1.0, 2e-6, 8e-6), (50, 1.0, 6e-8, 6e-8), (0, 0.95, 6e-8, 6e-8)],
)
def test_probabilities_are_as_exact_as_documented(top_k: int, top_p: float, likely: float, rare: float) -> None:
    """The figures of docs/exactness.md."""
    random = np.random.default_rng(1)
    policy = SamplingPolicy(temperature=0.7, top_k=top_k, top_p=top_p)
    for spread in (2, 4, 6):
        logits = (random.normal(size=152_064) * spread).astype(np.float32)
        dist = shape(logits, policy)
        weights = np.exp((logits[dist.ids].astype(np.float64) - logits.max()) / 0.7)
        exact = weights / weights.sum()
        error = np.abs(dist.probs / exact - 1.0)
        assert error[exact > 1e-6].max() < likely
        assert error.max() < rare
        assert np.abs(dist.probs - exact).sum() / 2 < 2e-7
