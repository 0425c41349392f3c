from typing import Any

import numpy as np
import pytest

from dssd.distribution import Dist
from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_device.client.drafting import DraftConstraint, restrict
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from schemas.policy import Mode
from tests.support.toy_grammar import GRAMMAR
from tests.support.toy_pair import ToyPair, policy

WORDS = GrammarTokenizer.of_words([f"t{token} " for token in range(6)], end_tokens=[0])
COMPILER = GrammarCompiler(lambda: WORDS)
PAIR = ToyPair.standard()
POLICY = policy(Mode.RESIDUAL, 1)


class Whole:
    """A drafter that knows of no grammar."""

    def __init__(self, dist: Dist | None) -> None:
        self.dist = dist

    def next(self, _policy: Any) -> Dist | None:
        return self.dist


def constraint() -> DraftConstraint:
    return DraftConstraint(COMPILER.matcher(GRAMMAR))


def test_what_a_drafter_says_is_cut_to_what_is_allowed() -> None:
    dist = Dist(np.array([3, 1, 2, 4]), np.array([0.4, 0.3, 0.2, 0.1]))
    found = restrict(dist, np.array([1, 4, 5]))
    assert found is not None
    assert found.ids.tolist() == [1, 4]
    assert found.probs.tolist() == pytest.approx([0.75, 0.25])
    assert restrict(dist, np.array([0, 5])) is None
    drafter: Any = Whole(dist)
    cut = constraint().next(drafter, POLICY, text=(1,))  # behind which 2, 3 or 5 may stand
    assert cut is not None
    assert cut.ids.tolist() == [3, 2]
    nothing: Any = Whole(None)
    assert constraint().next(nothing, POLICY, text=(1,)) is None


def test_a_drafter_that_can_shapes_only_what_is_allowed() -> None:
    drafter = ScriptedDrafter(PAIR.draft, PAIR.draft_words, end_tokens=(0,))
    drafter.reset((1, 1))
    found = constraint().next(drafter, POLICY, text=(1,))
    assert found is not None
    assert set(found.ids.tolist()) <= {2, 3, 5}
    assert found.probs.sum() == pytest.approx(1.0)


def test_a_text_that_the_grammar_rules_out_is_drafted_on_as_without_one() -> None:
    """It is the edge's affair; nothing but speed is lost."""
    dist = Dist(np.array([3]), np.ones(1))
    drafter: Any = Whole(dist)
    assert constraint().forced((1, 1)) is None
    assert constraint().next(drafter, POLICY, text=(1, 1)) is dist


def test_tokens_that_had_to_come_say_so_wherever_they_come_from() -> None:
    told = CommittedTokens((4, 5, 1, 1), (TokenOrigin.STREAMED,) * 4)
    found = constraint().origins([4, 5, 1, 1, 0], told, begin=0)
    assert found.origins == (TokenOrigin.STREAMED, *(TokenOrigin.FORCED,) * 3)
    rest = constraint().origins([4, 5, 1, 1, 0], CommittedTokens((1, 0), (TokenOrigin.BONUS,) * 2), begin=3)
    assert rest.origins == (TokenOrigin.FORCED,) * 2
