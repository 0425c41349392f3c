"""Constraint: a session's grammar at work. It alone decides which tokens of a text are possible."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist, point_mass, shape
from dssd.verification import Judgement
from fleet_runtime.grammar.errors import GrammarError
from fleet_runtime.grammar.matcher import GrammarMatcher
from schemas.policy import SamplingPolicy

__all__ = ["Constraint"]

_RULED_OUT = "The target model rules out every token that the grammar allows; loosen the grammar, or the prompt."


@dataclass(slots=True)
class Constraint:
    """A session's grammar. It is followed on the thread that computes, and asked for guesses on the orchestrator's.

    Attributes:
        matcher: Follows the text.
        failure: Why the text cannot go on, in a sentence; empty if it can.
    """

    matcher: GrammarMatcher
    failure: str = ""
    _forced: list[bool] = field(default_factory=list)  # by row of the case that is being judged

    def shape(self, row: NDArray[np.float32], policy: SamplingPolicy, *, text: Sequence[int]) -> Dist:
        """Return the target's distribution behind a text, given the grammar.

        Args:
            row: float32 `[vocabulary]`, the target's logits there.
            policy: The session's.
            text: The text with what is drafted of it, prompt left out.

        Raises:
            ValueError: There is none; `failure` says why, if it is not the logits' fault.
        """
        try:
            allowed = self.matcher.allowed(text)
        except GrammarError as error:
            self.failure = str(error)
            raise ValueError(self.failure) from error
        self._forced.append(len(allowed) == 1)
        if len(allowed) == 1:
            return point_mass(int(allowed[0]))
        if np.all(row[allowed] == -np.inf):
            self.failure = _RULED_OUT
            raise ValueError(self.failure)
        return shape(row, policy, allowed=allowed)

    def count(self, judgement: Judgement) -> Judgement:
        """Return a judgement with the forced tokens in it; the rows that it took were shaped just before."""
        forced, self._forced = self._forced, []
        decided = forced[: judgement.accepted + (judgement.token is not None)]
        return replace(judgement, forced=tuple(place for place, each in enumerate(decided) if each))

    def guess(self, text: Sequence[int], most: int) -> tuple[int, ...]:
        """Return what must follow a text, as far as that is known at once; at most so many tokens."""
        if most <= 0:
            return ()
        try:
            return self.matcher.forced(text)[:most]
        except GrammarError:
            return ()  # what is wrong is found out, and told, when the text is judged
