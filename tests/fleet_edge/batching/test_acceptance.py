"""Draft tokens are accepted as often as the mathematics says, from each position of a draft on, in each mode.

The excess of a draft is the number of its tokens that are accepted, less their probabilities. Its mean is 0. Drafts are
independent, so the mean of many is compared with their own spread (two-sided, false once in 10,000 seeds per
assertion). q is nearly p, so that few tokens are rejected and two percent are many.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from scipy import stats

from fleet_edge.batching.judging import Case, judge_batch
from sampling.distribution import Dist, shape
from sampling.drawing import Proposal, coupled_token, propose
from schemas.policy import Mode, SamplingPolicy
from tests.support.reference import TOTAL, quantized, shaped
from tests.support.score_test import Float, coupled
from tests.support.statistics import ALARM

SIZE, LENGTH = 12, 8
PAIRS, DRAFTS = 20, 100
NEAR = 0.03
"""Spread of the draft model's logits around the target's."""
WAYS = ("residual", "coupled", "edge-only")
MISTAKE = 1.02


def policy(way: str, seed: int) -> SamplingPolicy:
    mode = Mode.COUPLED if way in {"coupled", "edge-only"} else Mode.RESIDUAL
    return SamplingPolicy(mode=mode, temperature=0.9, top_k=SIZE - 2, top_p=1.0, seed=seed)


@cache
def languages() -> tuple[Float, Float]:
    """Return the logits of targets and draft models, `[PAIRS, LENGTH + 1, SIZE]`."""
    random = np.random.default_rng(11)
    target = random.normal(size=(PAIRS, LENGTH + 1, SIZE))
    # The two keep the same tokens.
    target[..., :2] -= 20.0
    return target.astype(np.float32), (target + random.normal(size=target.shape) * NEAR).astype(np.float32)


@cache
def expected(way: str) -> list[list[dict[int, float]]]:
    """Return the probability that each token is accepted, by pair and position."""
    found = []
    for target, draft in zip(*languages(), strict=True):
        rows = []
        for p_logits, q_logits in zip(target[:LENGTH], draft[:LENGTH], strict=True):
            p, q = (shaped(logits, policy(way, 0)) for logits in (p_logits, q_logits))
            if way in {"coupled", "edge-only"}:
                both = coupled(p, q).probs
                rows.append({token: both.get((token, False), 0.0) / prob for token, prob in q.items()})
            else:
                rows.append({token: min(1.0, p[token] * TOTAL / count) for token, count in quantized(q).items()})
        found.append(rows)
    return found


@cache
def draft_models() -> list[list[Dist]]:
    return [[shape(row, policy("residual", 0)) for row in rows[:LENGTH]] for rows in languages()[1]]


@cache
def drafted(way: str) -> list[list[Proposal]]:
    drafts = []
    for seed in range(PAIRS * DRAFTS):
        its, rows = policy(way, seed), draft_models()[seed % PAIRS]
        if way == "edge-only":
            drafts.append([Proposal(coupled_token(q, seed, place)) for place, q in enumerate(rows)])
        else:
            drafts.append([propose(q, policy=its, position=place) for place, q in enumerate(rows)])
    return drafts


def accepted(way: str, drafts: Sequence[Sequence[Proposal]], *, mistake: float, from_place: int) -> list[int]:
    """Return how many tokens of each draft the edge accepts.

    With a mistake, the target's rows make the drafted tokens as much more probable from a position on.
    """
    cases, logits = [], []
    for number, draft in enumerate(drafts):
        its, rows = policy(way, number), languages()[0][number % PAIRS].copy()
        for place in range(from_place, LENGTH):
            rows[place, draft[place].token] += its.temperature * math.log(mistake)
        logits.append(rows)
        tokens = tuple(each.token for each in draft)
        counts = None if way in {"coupled", "edge-only"} else tuple(each.count or 0 for each in draft)
        cases.append(Case(tokens, counts, its, 0, bonus=True, written=way == "edge-only"))
    found = []
    for judged in judge_batch(np.concatenate(logits), cases):
        assert judged is not None
        found.append(judged.accepted)
    return found


def excesses(way: str, *, mistake: float = 1.0, from_place: int = 0) -> Float:
    """Return the excess of each draft at each position, `[drafts, LENGTH]`."""
    drafts = drafted(way)
    excess = np.zeros((len(drafts), LENGTH))
    for number, head in enumerate(accepted(way, drafts, mistake=mistake, from_place=from_place)):
        for place, (token, probs) in enumerate(
            zip((each.token for each in drafts[number]), expected(way)[number % PAIRS], strict=True)
        ):
            if head >= place:
                excess[number, place] = (head > place) - probs[token]
    return excess


def p_values(excess: Float) -> list[float]:
    """Return the p-value of the excess from each position on."""
    return [float(stats.ttest_1samp(excess[:, place:].sum(axis=1), 0.0).pvalue) for place in range(LENGTH)]


@pytest.mark.parametrize("way", WAYS)
def test_drafts_are_accepted_as_often_as_the_method_says(way: str) -> None:
    assert min(p_values(excesses(way))) > ALARM


@pytest.mark.parametrize("mistake", [MISTAKE, 1.0 / MISTAKE], ids=["high", "low"])
@pytest.mark.parametrize("way", WAYS)
def test_two_percent_from_the_third_position_on_are_found(way: str, mistake: float) -> None:
    found = p_values(excesses(way, mistake=mistake, from_place=2))
    assert found[2] < ALARM


@pytest.mark.parametrize("way", ["coupled", "edge-only"])
def test_with_shared_noise_a_token_is_accepted_only_if_the_target_draws_it(way: str) -> None:
    laws = [
        [Dist(np.array(list(p)), np.array(list(p.values()))) for p in (shaped(row, policy(way, 0)) for row in rows)]
        for rows in languages()[0]
    ]
    drafts = drafted(way)
    for seed, head in enumerate(accepted(way, drafts, mistake=1.0, from_place=0)):
        own = [coupled_token(laws[seed % PAIRS][place], seed, place) for place in range(LENGTH)]
        wrong = (place for place, each in enumerate(drafts[seed]) if each.token != own[place])
        assert head == next(wrong, LENGTH)
