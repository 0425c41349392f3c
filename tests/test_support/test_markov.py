import numpy as np
import pytest

from dssd.distribution import shape
from schemas.policy import SamplingPolicy
from tests.support.markov import MAX_TABLE, MarkovScript

POLICY = SamplingPolicy(temperature=0.8, top_k=4, top_p=0.9, seed=1)


def test_logits_depend_on_the_last_token_and_with_a_period_on_the_position() -> None:
    plain = MarkovScript(size=6, seed=1)
    np.testing.assert_array_equal(plain.logits([1, 2, 3]), plain.logits([3]))
    assert not np.array_equal(plain.logits([3]), plain.logits([4]))
    timed = MarkovScript(size=6, seed=1, period=2)
    assert not np.array_equal(timed.logits([1, 3]), timed.logits([3]))
    np.testing.assert_array_equal(timed.logits([1, 2, 3]), timed.logits([3]))


@pytest.mark.parametrize("period", [1, 2])
def test_the_joint_law_is_the_product_of_shaped_rows(period: int) -> None:
    script = MarkovScript(size=5, seed=4, period=period)
    law = script.joint([2, 3], length=3, policy=POLICY)
    assert law.shape == (5, 5, 5)
    assert law.sum() == pytest.approx(1.0, abs=1e-6)
    for path in np.ndindex(law.shape):
        product, prefix = 1.0, [2, 3]
        for token in path:
            product *= shape(script.logits(prefix), POLICY).probability(token)
            prefix.append(token)
        assert law[path] == pytest.approx(product, abs=1e-12)


def test_a_perturbed_language_is_near_and_by_nothing_the_same() -> None:
    script = MarkovScript(size=50, seed=4)
    np.testing.assert_array_equal(script.perturbed(seed=9, amount=0.0).logits([1]), script.logits([1]))
    draft = script.perturbed(seed=9, amount=0.5)
    difference = draft.logits([1]) - script.logits([1])
    assert 0.3 < difference.std() < 0.7


def test_a_reader_cannot_change_the_language() -> None:
    with pytest.raises(ValueError, match="read-only"):
        MarkovScript(size=5, seed=4).logits([1])[0] = 7.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, "two tokens"),
        ({"size": 4, "period": 0}, "period of 1"),
        ({"size": 4, "sharpness": float("nan")}, "finite sharpness"),
        ({"size": 4, "sharpness": -1.0}, "finite sharpness"),
        ({"size": 1 << 14}, str(MAX_TABLE)),
    ],
)
def test_impossible_languages_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MarkovScript(seed=1, **arguments)


def test_an_empty_text_and_a_boundless_law_are_refused() -> None:
    script = MarkovScript(size=100, seed=4)
    with pytest.raises(ValueError, match="empty text"):
        script.logits([])
    with pytest.raises(ValueError, match="outcomes"):
        script.joint([1], length=4, policy=POLICY)
