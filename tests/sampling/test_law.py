"""Whatever q is, the output follows p: both modes, all downlink forms, over a million draws."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from sampling.distribution import Dist, draw_draft, quantize, shape
from sampling.downlink import FormName, choose_form, correct
from sampling.drawing import Purpose, coupled_token, random_uniform
from sampling.verification import judge
from schemas.policy import Mode, SamplingPolicy
from tests.support.statistics import ALARM, p_value, total_variation, total_variation_noise

DRAWS = 13_000  # by 20 pairs and four ways: 1,040,000 draws
VOCABULARIES = (2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 32, 50, 64, 100, 200, 500, 1000, 2000, 4000, 5000)
IN_SMALL = {**dict.fromkeys(range(4), ()), **dict.fromkeys((7, 19), pytest.mark.slow)}
WAYS = (
    (Mode.RESIDUAL, FormName.SPARSE),
    (Mode.RESIDUAL, FormName.SAMPLES),
    (Mode.RESIDUAL, FormName.DENSE),
    (Mode.COUPLED, FormName.AUTO),
)


@dataclass(frozen=True)
class Pair:
    p: Dist
    q: Dist
    vocabulary: int
    policy: SamplingPolicy


def pair(number: int, mode: Mode) -> Pair:
    """Return a random pair: some alike, some far apart, some with shaped supports that hardly overlap."""
    vocabulary = VOCABULARIES[number]
    random = np.random.default_rng(number)
    target = random.normal(size=vocabulary) * random.uniform(0.5, 3.0)
    draft = target + random.normal(size=vocabulary) * (0.05, 0.5, 2.0, 6.0)[number % 4]
    policy = SamplingPolicy(
        mode=mode,
        temperature=(0.7, 1.0, 1.5)[number % 3],
        top_k=(0, max(1, vocabulary // 2))[number % 2],
        top_p=(1.0, 0.9)[number // 2 % 2],
        seed=1000 + number,
    )
    return Pair(shape(target, policy), shape(draft, policy), vocabulary, policy)


def one_token(case: Pair, form: FormName, position: int) -> int:
    """Draft, judge and correct one token; return the token committed at `position`."""
    policy = case.policy
    if policy.mode is Mode.COUPLED:
        drafted, counts, q = coupled_token(case.q, policy.seed, position), None, None
    else:
        q = quantize(case.q)
        drafted, count = draw_draft(q, random_uniform(policy.seed, position, Purpose.DRAFT))
        counts = (count,)
    judgement = judge(lambda _: case.p, (drafted,), counts, policy=policy, base=position, bonus=False)
    if judgement.accepted:
        return drafted
    if judgement.token is not None:
        return judgement.token
    assert judgement.p is not None
    assert q is not None
    tried = 0
    while True:
        sent = choose_form(
            judgement.p,
            policy=policy,
            position=position,
            vocabulary_size=case.vocabulary,
            max_bytes=1 << 20,
            form=form,
            tried=tried,
        )
        token = correct(sent, q, policy=policy, position=position)
        if token is not None:
            return token
        tried = sent.start + len(sent.ids)  # type: ignore[union-attr] # only samples can fail


def empirical(case: Pair, form: FormName) -> NDArray[np.int64]:
    counts = np.zeros(case.vocabulary, dtype=np.int64)
    for position in range(DRAWS):
        counts[one_token(case, form, position)] += 1
    return counts


@pytest.mark.parametrize(("mode", "form"), WAYS, ids=str)
@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=IN_SMALL.get(number, pytest.mark.exhaustive)) for number in range(len(VOCABULARIES))],
)
def test_committed_tokens_follow_the_target(number: int, mode: Mode, form: FormName) -> None:
    case = pair(number, mode)
    law = np.zeros(case.vocabulary)
    law[case.p.ids] = case.p.probs
    counts = empirical(case, form)
    assert p_value(counts, law) > ALARM
    assert total_variation(counts, law) < total_variation_noise(law, DRAWS)


def test_the_drafts_own_law_is_told_from_the_targets() -> None:
    """The test rejects the draft's distribution, so the statistic has power."""
    case = pair(5, Mode.RESIDUAL)
    law = np.zeros(case.vocabulary)
    law[case.q.ids] = case.q.probs
    both = np.flatnonzero(law)
    counts = empirical(case, FormName.SPARSE)
    counts = np.where(np.isin(np.arange(case.vocabulary), both), counts, 0)
    assert p_value(counts, law) < ALARM
