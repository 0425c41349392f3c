"""Block verification: whatever q is and wherever drafts end, the output follows p."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from dssd.block import RejectedBlock, choose_try, end_race, reach, reject_block
from dssd.distribution import TOTAL, Dist, QuantizedDist, quantize
from dssd.sampling import Proposal, propose
from dssd.verification import judge_blocks
from schemas.policy import SamplingPolicy
from tests.support.statistics import ALARM, p_value

SIZE, LENGTH = 3, 4
IN_SMALL = {("unlike", False, 16), ("unlike", True, 1), ("similar", True, 16), ("equal", False, 1)}
Text = tuple[int, ...]


def language(seed: int, sharpness: float) -> Callable[[Text], Dist]:
    """Return a random distribution of the next token after each text."""

    @cache
    def row(text: Text) -> Dist:
        logits = np.random.default_rng([seed, *text]).normal(size=SIZE) * sharpness
        probs = np.exp(logits) / np.exp(logits).sum()
        order = np.argsort(-probs)
        return Dist(order, probs[order].astype(np.float32).astype(np.float64))

    return row


TARGET = language(1, 1.5)


@cache
def similar(text: Text) -> Dist:
    p, other = dense(TARGET(text)), dense(language(2, 1.0)(text))
    return Dist(np.arange(SIZE), 0.7 * p + 0.3 * other)


PAIRS = {"unlike": language(3, 2.0), "similar": similar, "equal": TARGET}


def dense(p: Dist) -> NDArray[np.float64]:
    values = np.zeros(SIZE)
    values[p.ids] = p.probs
    return values / values.sum()


def law() -> NDArray[np.float64]:
    """Return the joint distribution of LENGTH tokens."""
    joint = np.zeros((SIZE,) * LENGTH)
    for text in product(range(SIZE), repeat=LENGTH):
        joint[text] = np.prod([dense(TARGET(text[:place]))[text[place]] for place in range(LENGTH)])
    return joint


def lengths(text: Text) -> int:
    """Return the length of a draft, which depends on its tokens."""
    return 1 if text[:1] == (2,) else 3


@pytest.mark.parametrize("name", PAIRS)
def test_the_race_has_the_law_of_the_method(name: str) -> None:
    """All drafts are enumerated, and the race replaced by its probabilities: what is committed is exactly p."""
    draft = PAIRS[name]
    committed = np.zeros((SIZE,) * LENGTH)
    for tokens in product(range(SIZE), repeat=3):
        q = [quantize(draft(tokens[:place])) for place in range(3)]
        counts = [q[place].count(token) for place, token in enumerate(tokens)]
        if not all(counts):
            continue
        drawn = np.prod(np.array(counts) / TOTAL)
        rows, reached = reach(lambda place, text=tokens: TARGET(text[:place]), tokens, counts)  # type: ignore[misc]
        _add(committed, tokens, drawn * reached[-1])
        left = drawn * (1.0 - reached.pop())
        for place in reversed(range(len(reached))):
            rest = np.maximum(reached[place] * dense(rows[place]) - q[place].probabilities(np.arange(SIZE)), 0.0)
            stops = rest.sum() / (rest.sum() + 1.0 - reached[place]) if left > 0.0 and rest.any() else 0.0
            for token in range(SIZE):
                if rest[token]:
                    _add(committed, (*tokens[:place], token), left * stops * rest[token] / rest.sum())
            left *= 1.0 - stops
        assert left < 1e-6
    np.testing.assert_allclose(committed, law(), atol=1e-6)


def _add(committed: NDArray[np.float64], tokens: Text, mass: float) -> None:
    """Add a text and what the target would write behind it."""
    if len(tokens) == LENGTH:
        committed[tokens] += mass
        return
    for token, prob in enumerate(dense(TARGET(tokens))):
        _add(committed, (*tokens, token), mass * prob)


def write(draft: Callable[[Text], Dist], seed: int, *, ahead: bool = False, tries: int = 2) -> Text:
    """Write LENGTH tokens as device and edge do; `ahead` verifies two drafts of one token together.

    The device ends a race after `tries`.
    """
    policy, text = SamplingPolicy(seed=seed), list[int]()
    while len(text) < LENGTH:
        drafts = [_draft(draft, policy, text)]
        if ahead:
            drafts = [drafts[0][:1]]
            drafts.append(_draft(draft, policy, [*text, drafts[0][0].token])[:1])
        proposals = [each for part in drafts for each in part]
        tokens = [each.token for each in proposals]
        judged = judge_blocks(
            lambda place, known=(*text,), new=(*tokens,): TARGET((*known, *new[:place])),  # type: ignore[misc]
            tokens,
            [each.count or 0 for each in proposals],
            lengths=[len(part) for part in drafts],
            policy=policy,
            base=len(text),
            bonus=True,
        )
        assert judged.rejected == (judged.p is not None)
        text += tokens[: judged.accepted]
        if judged.token is not None:
            text.append(judged.token)
            continue
        assert isinstance(judged.p, RejectedBlock)
        rest = [each.quantized for each in proposals[judged.accepted :] if each.quantized is not None]
        start = len(text)
        found = _race(judged.p, rest, tries, start=start)
        text += [*tokens[judged.accepted :][: found[0]], found[1]]
    return tuple(text[:LENGTH])


def _draft(draft: Callable[[Text], Dist], policy: SamplingPolicy, text: Sequence[int]) -> list[Proposal]:
    made: list[Proposal] = []
    while len(made) < lengths((*text, *(each.token for each in made))):
        q = draft((*text, *(each.token for each in made)))
        made.append(propose(q, policy=policy, position=len(text), index=len(made)))
    return made


def _race(block: RejectedBlock, drafted: Sequence[QuantizedDist], number: int, *, start: int) -> tuple[int, int]:
    tries = block.tries(number)
    assert len(tries.ids) == len(block.offered) == number
    found = choose_try(tries, drafted)
    if found is None:
        found = end_race(block.remainder(), drafted, seed=block.seed, start=start)
    assert block.offers(*found)
    return found


@pytest.mark.parametrize(
    ("name", "ahead", "tries"),
    [
        pytest.param(name, ahead, tries, marks=[] if (name, ahead, tries) in IN_SMALL else pytest.mark.exhaustive)
        for name, ahead, tries in product(PAIRS, (False, True), (1, 16))
    ],
)
def test_committed_tokens_follow_the_target(name: str, ahead: bool, tries: int) -> None:
    counts = np.zeros((SIZE,) * LENGTH, dtype=np.int64)
    for seed in range(4000):
        counts[write(PAIRS[name], seed, ahead=ahead, tries=tries)] += 1
    assert p_value(counts, law()) > ALARM


def test_what_ends_a_race_ends_every_race() -> None:
    """Of a pair whose tries pass once in thousands."""
    nearly = Dist(np.arange(2), np.array([0.5, 0.5]))
    q = [quantize(Dist(np.arange(2), np.array([0.5001, 0.4999])))] * 3
    for seed in range(200):
        block = RejectedBlock([nearly] * 3, [1.0, 0.9999, 0.9998], seed=seed, start=0)
        assert choose_try(block.tries(16), q) is None
        assert block.offers(*end_race(block.remainder(), q, seed=seed, start=0))


@pytest.mark.parametrize("accepted", range(3))
def test_a_race_offers_what_was_sent_and_nothing_else(accepted: int) -> None:
    p = Dist(np.arange(2), np.array([0.5, 0.5]))
    block = RejectedBlock([p] * 2, [1.0, 0.5], seed=1, start=0)
    assert not block.offers(accepted, 1)
    block.remainder()
    assert block.offers(accepted, 1) == (accepted < 2)
    assert not block.offers(accepted, 2)


def test_more_tokens_are_accepted_than_one_by_one() -> None:
    """Of a token that is too likely and one that is too unlikely in q, both are accepted if their product is equal."""
    row = Dist(np.array([0, 1]), np.array([0.5, 0.5]))
    rows, reached = reach(lambda _: row, (0, 0), (TOTAL // 4, TOTAL // 1))
    assert reached == [1.0, 1.0, 0.5]
    assert reach(lambda _: row, (0, 0), (TOTAL, TOTAL // 4))[1] == [1.0, 0.5, 1.0]
    assert len(rows) == 2


def test_an_impossible_token_ends_a_block() -> None:
    asked: list[int] = []

    def row(place: int) -> Dist:
        asked.append(place)
        return Dist(np.array([0]), np.ones(1))

    block = reject_block(row, (0, 1, 0), (TOTAL, TOTAL, TOTAL), seed=1, start=0)
    assert block is not None
    assert asked == [0, 1]
    tries = block.tries(3)
    assert set(tries.heads) == {1}
    assert choose_try(tries, [quantize(Dist(np.array([1]), np.ones(1)))] * 3) == (1, 0)
