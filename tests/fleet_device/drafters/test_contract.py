import random

import pytest

from fleet_device.drafters.contract import DrafterError
from fleet_device.settings import NO_DRAFTER
from sampling.distribution import Dist
from schemas.fields import MAX_TOKENS
from tests.fleet_device.drafters.conftest import CONTEXT, KINDS, POLICY, Make

pytestmark = pytest.mark.parametrize(
    "make", [*KINDS, "llama.cpp in small batches", "llama.cpp beside suffix", "llama.cpp, a hybrid"], indirect=True
)


def equal(left: Dist | None, right: Dist | None) -> bool:
    """Compare up to rounding: llama.cpp adds up in another order in a chunk, or behind a copy, than token by token."""
    if left is None or right is None:
        return left is right
    return all(abs(left.probability(token) - right.probability(token)) < 1e-4 for token in (*left.ids, *right.ids))


def test_any_history_gives_what_a_fresh_drafter_gives_over_the_same_tokens(make: Make) -> None:
    used, fresh = make(), make()
    rng = random.Random(5)

    def some(most: int) -> list[int]:
        return [rng.randrange(10) for _ in range(rng.randint(1, most))]

    tokens = some(20)
    used.reset(tokens)
    compared = 0
    for _ in range(150):
        match rng.randrange(4):
            case 0 if len(tokens) < CONTEXT - 10:
                more = some(10)
                tokens = tokens + more
                used.extend(more)
            case 1 if len(tokens) > 1:
                tokens = tokens[: rng.randint(1, len(tokens))]
                used.truncate(len(tokens))
            case 2:
                tokens = tokens[: rng.randint(0, len(tokens))] + some(8)
                tokens = tokens[:CONTEXT]
                used.reset(tokens)
            case _:
                fresh.reset([11])  # shares no beginning with any sequence here
                fresh.reset(tokens)
                assert equal(used.next(POLICY), fresh.next(POLICY)), tokens
                compared += 1
    assert compared > 20


def test_next_changes_nothing(make: Make) -> None:
    drafter = make()
    drafter.reset([3, 4, 5, 3, 4])
    first = drafter.next(POLICY)
    assert equal(first, drafter.next(POLICY))


def test_another_end_of_the_same_length_is_looked_at_anew(make: Make) -> None:
    drafter, fresh = make(), make()
    drafter.reset([3, 4, 5, 3, 4])
    drafter.next(POLICY)
    drafter.truncate(3)
    drafter.extend([4, 5])
    fresh.reset([3, 4, 5, 4, 5])
    assert equal(drafter.next(POLICY), fresh.next(POLICY))


def test_a_distribution_is_whole_and_within_the_vocabulary(make: Make) -> None:
    drafter = make()
    drafter.reset([3, 4, 5, 3, 4])
    dist = drafter.next(POLICY)
    if drafter.name == NO_DRAFTER:
        assert dist is None
        return
    assert dist.ids.max() < drafter.vocabulary.size
    assert abs(dist.probs.sum() - 1.0) < 1e-5


def test_a_full_context_is_said_and_truncation_helps(make: Make) -> None:
    drafter = make()
    assert drafter.context in (CONTEXT, MAX_TOKENS)  # without a model the target's is the limit
    drafter.reset([3] * drafter.context)
    drafter.next(POLICY)
    drafter.extend([3])
    with pytest.raises(DrafterError):
        drafter.next(POLICY)
    drafter.truncate(drafter.context)
    drafter.next(POLICY)


def test_an_empty_sequence_is_refused(make: Make) -> None:
    drafter = make()
    drafter.reset([3])
    drafter.truncate(0)
    with pytest.raises(DrafterError):
        drafter.next(POLICY)


def test_a_token_outside_the_vocabulary_is_refused_and_changes_nothing(make: Make) -> None:
    drafter = make()
    drafter.reset([3, 4, 3])
    before = drafter.next(POLICY)
    for wrong in (-1, drafter.vocabulary.size, 1 << 40):
        with pytest.raises(DrafterError):
            drafter.extend([3, wrong])
        with pytest.raises(DrafterError):
            drafter.reset([wrong])
    assert equal(before, drafter.next(POLICY))


def test_truncating_beyond_the_end_is_nothing(make: Make) -> None:
    drafter = make()
    drafter.reset([3, 4, 3])
    before = drafter.next(POLICY)
    drafter.truncate(50)
    assert equal(before, drafter.next(POLICY))


def test_closing_twice_is_allowed_and_names_are_told(make: Make) -> None:
    drafter = make()
    assert drafter.name
    assert drafter.quantization
    assert 0 in drafter.codec.end_tokens
    drafter.close()
    drafter.close()
