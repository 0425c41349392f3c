import pytest

from fleet_device.drafters.suffix import Trust, make_guess
from fleet_device.drafters.suffix_index import Match
from schemas.policy import SamplingPolicy

POLICY = SamplingPolicy(temperature=1.0, seed=1)


def match(followers: list[int], alike: list[int]) -> Match:
    return Match(followers, alike)


def test_what_followed_is_guessed_with_its_counts() -> None:
    guess = make_guess([match([7, 4, 7], [8, 8, 8]), match([7], [8])], POLICY)
    assert guess.dist.ids.tolist() == [7, 4]
    assert guess.dist.probs.tolist() == [0.75, 0.25]
    assert guess.likeliest == 7


def test_a_place_that_is_more_alike_counts_for_more() -> None:
    guess = make_guess([match([7, 4], [2, 5])], POLICY)
    assert guess.likeliest == 4
    assert guess.dist.probability(7) == pytest.approx(1 / 9)


def test_a_greedy_policy_has_the_likeliest_alone() -> None:
    guess = make_guess([match([7, 4, 7], [8, 8, 8])], SamplingPolicy(temperature=0.0, seed=1))
    assert guess.dist.ids.tolist() == [7]
    assert guess.dist.probs.tolist() == [1.0]


def test_trust_is_what_guesses_of_a_kind_have_earned() -> None:
    trust = Trust()
    sure, unsure = make_guess([match([7] * 6, [16] * 6)], POLICY), make_guess([match([7, 8], [2, 2])], POLICY)
    assert trust.of(sure) > 2 * trust.of(unsure)
    before = trust.of(unsure)
    for _ in range(50):
        trust.learn(sure, 9)
    assert trust.of(sure) < 0.1
    assert trust.of(unsure) == before
    for _ in range(100):
        trust.learn(sure, 7)
    assert trust.of(sure) > 0.75
