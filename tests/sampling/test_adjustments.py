"""Least length, biases, penalties and min_p, against plain Python and the processors of transformers."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from sampling.distribution import shape
from schemas.policy import SamplingPolicy
from tests.support.reference import adjusted, shaped

SIZE = 12
ENDS = (3,)
LOGITS = arrays(np.float32, SIZE, elements=st.floats(-20, 20, width=16).map(lambda value: round(value, 2)), unique=True)
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=6)


def policies() -> st.SearchStrategy[SamplingPolicy]:
    hundredths = st.integers(-200, 200).map(lambda value: value / 100)
    biases = st.dictionaries(st.integers(0, SIZE - 1), hundredths, max_size=4).map(
        lambda each: tuple(sorted(each.items()))
    )
    return st.builds(
        SamplingPolicy,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        top_k=st.sampled_from([0, 3, 50]),
        top_p=st.sampled_from([0.6, 1.0]),
        seed=st.just(1),
        min_p=st.sampled_from([0.0, 0.05, 0.4]),
        presence_penalty=hundredths,
        frequency_penalty=hundredths,
        repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
        logit_bias=biases,
        min_tokens=st.integers(0, 4),
    )


@given(logits=LOGITS, policy=policies(), prompt=TOKENS, generated=TOKENS, allowed=st.sets(st.integers(0, SIZE - 1)))
def test_every_control_follows_the_formulas(
    logits: NDArray[Any], policy: SamplingPolicy, prompt: list[int], generated: list[int], allowed: set[int]
) -> None:
    placed, before = policy.after(prompt, generated, ENDS), logits.copy()
    scores = sorted(adjusted(dict(enumerate(logits.tolist())), placed).values())
    assume(all(other - one > 1e-3 for one, other in pairwise(scores)))  # the product's are rounded to float32
    for ids in (None, np.array(sorted(allowed), dtype=np.int64) if allowed else None):
        mine = shape(logits, placed, allowed=ids)
        ours = dict(zip(mine.ids.tolist(), mine.probs.tolist(), strict=True))
        listed = None if ids is None else ids.tolist()
        rights = [shaped(logits, near, allowed=listed) for near in neighbours(placed)]
        assert any(distance(ours, right) < 1e-4 for right in rights), rights
    assert (logits == before).all(), "the engine's logits are not changed in place"


def neighbours(policy: SamplingPolicy) -> list[SamplingPolicy]:
    """Return the policy, and those whose edges of top_p and min_p lie within the rounding."""
    moved = [{}, {"top_p": policy.top_p - 1e-5}, {"top_p": min(1.0, policy.top_p + 1e-5)}]
    return [
        policy.model_copy(update={**each, "min_p": policy.min_p * factor})
        for each in moved
        for factor in (1.0, 1 - 1e-5, 1 + 1e-5)
    ]


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    return sum(abs(one.get(token, 0.0) - other.get(token, 0.0)) for token in {*one, *other})


def theirs(processor: Any, prompt: list[int], generated: list[int], logits: NDArray[Any]) -> NDArray[Any]:
    scores = processor(torch.tensor([[*prompt, *generated]]), torch.from_numpy(logits.copy())[None])
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize(
    ("given", "processor"),
    [
        ({"repetition_penalty": 1.3}, RepetitionPenaltyLogitsProcessor(1.3)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
        ({"logit_bias": ((2, 1.5), (7, -3.0))}, SequenceBiasLogitsProcessor({(2,): 1.5, (7,): -3.0})),
        ({"min_tokens": 3}, MinNewTokensLengthLogitsProcessor(2, 3, list(ENDS), device="cpu")),
    ],
)
def test_each_control_is_that_of_transformers(given: dict[str, Any], processor: Any) -> None:
    random = np.random.default_rng(5)
    for length in (0, 2, 5):
        logits = random.standard_normal(SIZE).astype(np.float32) * 3
        prompt, generated = [1, 2], random.integers(0, SIZE, length).tolist()
        plain = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1, **given)
        mine = shape(logits, plain.after(prompt, generated, ENDS))
        probs = np.zeros(SIZE)
        probs[mine.ids] = mine.probs
        assert probs == pytest.approx(theirs(processor, prompt, generated, logits), abs=1e-6)


def test_a_penalty_counts_each_time_and_a_presence_once() -> None:
    logits = np.zeros(SIZE, dtype=np.float32)
    policy = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1, frequency_penalty=0.5, presence_penalty=0.25)
    found = shape(logits, policy.after([4], [5, 5, 6], ENDS))
    odds = np.log(found.probs / found.probability(0))
    assert odds[[4, 5, 6]] == pytest.approx([0.0, -1.25, -0.75], abs=1e-6), "a prompt's tokens are not penalised"


def test_an_output_that_a_grammar_ends_is_not_made_longer() -> None:
    policy = SamplingPolicy(temperature=1.0, seed=1, min_tokens=5).after([1], [2], ENDS)
    found = shape(np.zeros(SIZE, dtype=np.float32), policy, allowed=np.array(ENDS))
    assert found.ids.tolist() == list(ENDS)
    assert shape(np.zeros(SIZE, dtype=np.float32), policy, allowed=np.array([3, 4])).ids.tolist() == [4]


def test_a_policy_that_adjusts_nothing_has_no_history() -> None:
    policy = SamplingPolicy(seed=1, min_p=0.1)
    assert policy.after([1], [2], ENDS) is policy
    assert policy.plain() is policy
    adjusting = SamplingPolicy(seed=1, min_tokens=2, min_p=0.1)
    assert adjusting.plain() == policy
    assert adjusting.history is None
    assert adjusting.after([1], [2], ENDS).history is not None
