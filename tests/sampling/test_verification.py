from collections.abc import Callable

import numpy as np
import pytest

from sampling.distribution import TOTAL, Dist, point_mass
from sampling.drawing import Purpose, coupled_token, draw, random_uniform
from sampling.verification import judge
from schemas.policy import Mode, SamplingPolicy

RESIDUAL = SamplingPolicy(mode=Mode.RESIDUAL, seed=5)
COUPLED = SamplingPolicy(mode=Mode.COUPLED, seed=5)
EVEN = Dist(np.array([1, 2]), np.array([0.5, 0.5]))
CERTAIN = (TOTAL,)


def rows(*dists: Dist) -> tuple[Callable[[int], Dist], list[int]]:
    asked: list[int] = []

    def row(number: int) -> Dist:
        asked.append(number)
        return dists[number]

    return row, asked


def test_a_draft_that_is_wholly_accepted_gets_a_bonus_token() -> None:
    row, asked = rows(point_mass(1), point_mass(2), EVEN)
    judgement = judge(row, (1, 2), CERTAIN * 2, policy=RESIDUAL, base=4, bonus=True)
    assert (judgement.accepted, judgement.rejected, judgement.p) == (2, False, None)
    assert judgement.token == draw(EVEN, random_uniform(5, 6, Purpose.BONUS))
    assert asked == [0, 1, 2]


def test_no_bonus_token_is_drawn_where_another_draft_follows() -> None:
    row, asked = rows(point_mass(1), EVEN)
    judgement = judge(row, (1,), CERTAIN, policy=RESIDUAL, base=4, bonus=False)
    assert (judgement.accepted, judgement.token, judgement.p) == (1, None, None)
    assert asked == [0]


def test_the_first_rejected_token_ends_the_accepted_head_and_p_is_sent() -> None:
    row, asked = rows(point_mass(1), EVEN, EVEN, EVEN)
    judgement = judge(row, (1, 3, 1), CERTAIN * 3, policy=RESIDUAL, base=4, bonus=True)
    assert (judgement.accepted, judgement.rejected, judgement.token) == (1, True, None)
    assert judgement.p is EVEN
    assert asked == [0, 1]


def test_a_token_is_decided_by_the_random_number_of_its_position() -> None:
    accepted = [
        judge(lambda _: EVEN, (1,), CERTAIN, policy=RESIDUAL, base=base, bonus=False).accepted for base in range(200)
    ]
    assert accepted == [random_uniform(5, base, Purpose.ACCEPT) < 0.5 for base in range(200)]
    assert 60 < sum(accepted) < 140


def test_an_empty_draft_gets_one_token() -> None:
    row, asked = rows(point_mass(2))
    assert judge(row, (), (), policy=RESIDUAL, base=0, bonus=True).token == 2
    assert asked == [0]


@pytest.mark.parametrize("base", range(20))
def test_in_coupled_mode_the_targets_own_token_is_the_measure_and_the_correction(base: int) -> None:
    own = coupled_token(EVEN, 5, base)
    right = judge(lambda _: EVEN, (own,), None, policy=COUPLED, base=base, bonus=True)
    wrong = judge(lambda _: EVEN, (3 - own,), None, policy=COUPLED, base=base, bonus=True)
    assert (right.accepted, right.rejected, right.token) == (1, False, coupled_token(EVEN, 5, base + 1))
    assert (wrong.accepted, wrong.rejected, wrong.token, wrong.p) == (0, True, own, None)


def test_a_draft_without_counts_is_rejected_in_residual_mode() -> None:
    assert judge(lambda _: point_mass(1), (1,), None, policy=RESIDUAL, base=0, bonus=True).rejected


def test_how_a_text_is_cut_into_drafts_does_not_matter() -> None:
    """The same tokens at the same positions get the same random numbers."""
    tokens = [1, 2] * 20
    counts = [TOTAL // 2 + 9000] * 40
    whole = judge(lambda _: EVEN, tokens, counts, policy=RESIDUAL, base=7, bonus=False)
    taken = 0
    while taken < 40:
        part = judge(lambda _: EVEN, tokens[taken:][:3], counts[:3], policy=RESIDUAL, base=7 + taken, bonus=False)
        taken += part.accepted
        if part.rejected:
            break
    assert taken == whole.accepted
