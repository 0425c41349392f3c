"""The score test: false alarms as often as it says, and small mistakes found."""

import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks.exactness.cases import LONG, Variant
from benchmarks.exactness.power import MISTAKES, Simulation
from sampling.distribution import Dist
from sampling.downlink import FormName
from sampling.drawing import coupled_token
from schemas.policy import Mode
from tests.support.score_test import LOG_P, ScoreTest, coupled, dependence, residual, untested
from tests.support.statistics import ALARM, p_value
from tests.support.toy_pair import Languages

STANDARD = Variant(Mode.RESIDUAL, FormName.AUTO, 2)
NEAR = Variant(Mode.RESIDUAL, FormName.AUTO, 8, languages=Languages.NEAR, tokens=LONG)
P = {4: 0.4, 1: 0.3, 7: 0.2, 2: 0.1}
Q = {1: 0.5, 4: 0.25, 2: 0.15, 9: 0.1}


@pytest.mark.parametrize("case", [STANDARD, NEAR], ids=["standard", "near"])
def test_p_values_without_a_mistake_are_uniform(case: Variant) -> None:
    """Kolmogorov-Smirnov over 200 repetitions; 2 assertions, each false once in 10,000 seeds."""
    simulation, random = Simulation(case), np.random.default_rng(3)
    found = [simulation.p_values(300, {}, random)[1] for _ in range(200)]
    assert stats.kstest(found, "uniform").pvalue > ALARM


@pytest.mark.parametrize(
    ("case", "sessions", "mistake"),
    [
        (NEAR, 1000, "acceptance 2 % low"),
        (NEAR, 1000, "q reported 2 % high"),
        (STANDARD, 1000, "3 % of corrections drawn from p"),
    ],
    ids=["acceptance", "reported", "corrected"],
)
def test_a_mistake_of_some_percent_is_found_by_it_and_not_by_the_joint_distribution(
    case: Variant, sessions: int, mistake: str
) -> None:
    simulation, random = Simulation(case), np.random.default_rng(4)
    found = np.array([simulation.p_values(sessions, MISTAKES[mistake], random) for _ in range(20)]) < ALARM
    joint, score = found.mean(axis=0)
    assert score >= 0.9
    assert joint <= 0.1


def test_a_correction_that_the_residual_excludes_is_impossible() -> None:
    score = ScoreTest()
    outcomes = residual(P, Q)
    score.add(outcomes, (4, True), times=10)
    assert score.p_value() != 0.0
    score.add(outcomes, (1, True))
    assert score.p_value() == 0.0


def test_outcomes_of_coupled_drafts_are_those_of_shared_noise() -> None:
    """Chi-square over 20,000 seeds, false once in 10,000."""
    p, q = (Dist(np.array(list(each)), np.array(list(each.values()))) for each in (P, Q))
    outcomes = coupled(P, Q)
    places = {outcome: place for place, outcome in enumerate(outcomes.probs)}
    counts = np.zeros(len(places), dtype=np.int64)
    for seed in range(20_000):
        token = coupled_token(p, seed, 3)
        counts[places[token, token != coupled_token(q, seed, 3)]] += 1
    assert p_value(counts, np.array(list(outcomes.probs.values()))) > ALARM
    for token, prob in P.items():
        assert sum(outcomes.probs.get((token, corrected), 0.0) for corrected in (False, True)) == pytest.approx(prob)


def test_equal_texts_are_dependent_and_others_are_not() -> None:
    outcomes, random = untested(P, Q), np.random.default_rng(5)
    variance = float(outcomes.covariance[LOG_P, LOG_P])
    texts = [
        [
            (float(outcomes.scores[token, None][LOG_P]), variance)
            for token in random.choice(list(P), 3, p=list(P.values()))
        ]
        for _ in range(400)
    ]
    apart = dependence(list(itertools.pairwise(texts)))
    equal = dependence([(text, text) for text in texts])
    assert apart is not None
    assert equal is not None
    assert apart > ALARM > equal
