import numpy as np
import pytest

from dssd.distribution import shape
from schemas.policy import SamplingPolicy
from tests.support.markov import MarkovScript

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
