from typing import Any

import pytest
from pydantic import ValidationError

from schemas.policy import Mode, SamplingPolicy, random_seed


def test_the_defaults_are_those_that_were_agreed() -> None:
    policy = SamplingPolicy(seed=1)
    assert (policy.mode, policy.temperature, policy.top_k, policy.top_p) == (Mode.RESIDUAL, 0.7, 50, 0.95)
    assert not policy.greedy
    assert SamplingPolicy(temperature=0).greedy


def test_seeds_are_random_and_fit_a_signed_integer() -> None:
    seeds = {SamplingPolicy().seed for _ in range(100)} | {random_seed() for _ in range(100)}
    assert len(seeds) == 200
    assert max(seeds) < 2**63


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": True},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1.0},
        {"top_k": True},
        {"top_k": 1_000_001},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
        {"mode": "other"},
    ],
    ids=repr,
)
def test_what_describes_no_distribution_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingPolicy(**wrong)
