import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from sampling.distribution import shape
from sampling.downlink import dense, probability_of, samples, sparse
from sampling.verification import logprobs_of_correction, logprobs_of_rejection, logprobs_of_token
from schemas.codec import decode_verdict, encode_verdict
from schemas.fields import MIN_LOGPROB, Logprobs
from schemas.messages import Verdict
from schemas.policy import SamplingPolicy

SIZE = 40
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=SIZE, max_size=SIZE).map(np.array)
POLICIES = st.builds(
    SamplingPolicy,
    temperature=st.just(0.0) | st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 5, 30]),
    top_p=st.floats(0.3, 1),
    seed=st.integers(0, 99),
)


def plain(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits - np.log(np.sum(np.exp(logits))))


@given(LOGITS, st.integers(0, SIZE - 1), st.integers(0, 20))
def test_a_token_has_the_logarithm_of_its_share(logits: np.ndarray, token: int, most: int) -> None:
    told, expected = logprobs_of_token(logits, token, most=most), plain(logits)
    assert told.logprob == pytest.approx(expected[token], abs=1e-9)
    assert told.values == pytest.approx(sorted(expected, reverse=True)[:most], abs=1e-9)
    assert [expected[each] for each in told.ids] == pytest.approx(told.values, abs=1e-9)


@given(LOGITS, POLICIES, st.sampled_from(["sparse", "samples", "dense"]))
def test_a_correction_s_follows_from_p_and_the_offset(logits: np.ndarray, policy: SamplingPolicy, form: str) -> None:
    p = shape(logits, policy)
    sent = {
        "sparse": lambda: sparse(p),
        "samples": lambda: samples(p, policy=policy, position=3, start=0, number=16),
        "dense": lambda: dense(p, SIZE),
    }[form]()
    told = logprobs_of_rejection(logits, p, policy=policy, most=3)
    verdict = Verdict(handle=1, round=2, accepted=0, next=sent, logprobs=Logprobs.of([told]))
    received = decode_verdict(encode_verdict(verdict))
    assert received.logprobs is not None
    (heard,) = received.logprobs.tokens()
    for token in p.ids.tolist() if form != "samples" else received.next.ids:  # type: ignore[union-attr]
        own = logprobs_of_correction(heard, probability_of(received.next, token), policy=policy)
        assert own.logprob == pytest.approx(plain(logits)[token], abs=1e-4)
        assert own.ids == told.ids


def test_what_is_impossible_has_a_number_too() -> None:
    logits = np.array([0.0, -np.inf, 0.0])
    told = logprobs_of_token(logits, 1, most=3)
    assert told.logprob == MIN_LOGPROB
    assert told.values == pytest.approx((math.log(0.5), math.log(0.5), MIN_LOGPROB))
