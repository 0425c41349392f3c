"""What an observer of sizes is said to learn is what he learns."""

import random

import pytest

from benchmarks.hostile.padding import Round, Sent, entropy, information, observe, rounds_of
from schemas.codec import encode_draft, encode_verdict
from schemas.downlink import Sparse
from schemas.messages import Draft, Verdict


def draft(number: int, tokens: int, at: float = 0.0) -> Sent:
    message = Draft(handle=1, round=number, epoch=0, base=30, tokens=(300,) * tokens, digest=1 << 31)
    return Sent(at, encode_draft(message), message)


def verdict(number: int, accepted: int, support: int = 0, at: float = 0.0) -> Sent:
    p = Sparse(ids=tuple(range(support)), probs=(1.0 / support,) * support) if support else 40_000
    message = Verdict(handle=1, round=number, accepted=accepted, next=p, queue_ms=1.0, compute_ms=1.0)
    return Sent(at, encode_verdict(message), message)


def rounds(number: int = 400) -> list[Round]:
    """Drafts of 4 and of 8 tokens; a rejection shows in the verdict's size, where it was does not."""
    rng = random.Random(1)
    made = []
    for _ in range(number):
        length = rng.choice((4, 8))
        accepted = rng.choice((length, rng.randrange(length)))
        decided = verdict(1, accepted, support=0 if accepted == length else 16)
        made.append(Round(draft(1, length), decided, draft(2, 4)))
    return made


def test_information_is_what_is_shared_and_nothing_else() -> None:
    rng = random.Random(2)
    coin = [rng.randrange(4) for _ in range(2000)]
    noise = [rng.randrange(50) for _ in coin]
    assert entropy(coin) == pytest.approx(2.0, abs=0.01)
    assert information(coin, coin) == pytest.approx(2.0, abs=0.02)
    assert information(coin, [value // 2 for value in coin]) == pytest.approx(1.0, abs=0.02)
    assert information(coin, noise) < 0.02
    assert information(coin, [0] * len(coin)) == 0.0


def test_sizes_tell_until_they_are_all_alike() -> None:
    plain = observe(rounds(), 1000, device=0, edge=0)
    assert (plain.draft_sizes, plain.verdict_sizes) == (2, 2)
    assert plain.length_bits == pytest.approx(1.0, abs=0.02)
    assert plain.accepted_bits > 0.8
    assert plain.round_bits > plain.accepted_bits  # a whole draft of 4 is told from one of 8
    padded = observe(rounds(), 1000, device=64, edge=128)
    assert (padded.draft_sizes, padded.verdict_sizes) == (1, 1)
    assert (padded.length_bits, padded.accepted_bits, padded.round_bits) == (0.0, 0.0, 0.0)
    assert padded.up_bytes == 400 * 64 / 1000
    assert padded.down_bytes == 400 * 128 / 1000


def test_a_round_is_a_draft_its_verdict_and_the_draft_behind() -> None:
    first, second, third = draft(1, 2), draft(2, 2), draft(3, 2)
    one, two = verdict(1, 2), verdict(2, 0, support=3)
    assert rounds_of([first, one, second, two]) == [Round(first, one, second), Round(second, two, None)]
    ahead = rounds_of([first, second, one, two, third])  # the second was sent ahead, and is answered all the same
    assert ahead == [Round(first, one, None), Round(second, two, third)]
