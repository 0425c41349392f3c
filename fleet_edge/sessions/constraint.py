"""Constraint: a session's grammar at work. It alone decides which tokens of a generation are possible."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist, point_mass, shape
from dssd.verification import Judgement
from fleet_common.grammar.errors import GrammarError, GrammarKilled
from fleet_common.grammar.process import CompiledGrammar, GrammarMatcher
from schemas.policy import SamplingPolicy

_RULED_OUT = "The target model rules out every token that the grammar allows; loosen the grammar, or the prompt."


@dataclass(slots=True)
class Constraint:
    """A session's grammar. It is followed on the thread that computes; the orchestrator's reads what is known.

    Attributes:
        matcher: Follows the text.
        clock: Monotonic seconds.
        failure: Why the text cannot go on, in a sentence; empty if it can.
        killed: Digest of the grammar if this session has made it end its process.
    """

    matcher: GrammarMatcher
    clock: Callable[[], float] = time.monotonic
    failure: str = ""
    killed: str = ""
    _forced: list[bool] = field(default_factory=list)  # by row of the case that is being judged
    _ahead: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # a text, and what must follow it
    _spent_s: float = 0.0

    @classmethod
    def begin(cls, compiled: CompiledGrammar, text: Sequence[int] = ()) -> "Constraint":
        """Return the constraint of a session that begins, or resumes with a text.

        Raises:
            GrammarError: The grammar rules the text out, or cannot follow it.
        """
        constraint = cls(GrammarMatcher(compiled))
        constraint.matcher.check(text)
        constraint.look_ahead(text)
        constraint._spent_s = 0.0
        return constraint

    def shape(self, row: NDArray[np.float32], policy: SamplingPolicy, *, text: Sequence[int]) -> Dist:
        """Return the target's distribution behind a text, given the grammar.

        Args:
            row: float32 `[vocabulary]`, the target's logits there.
            policy: The session's.
            text: The text with what is drafted of it, prompt left out.

        Raises:
            ValueError: There is none; `failure` says why, if it is not the logits' fault.
        """
        began = self.clock()
        try:
            allowed = self.matcher.allowed(text)
        except GrammarError as error:
            self.failure = str(error)
            self._note(error)
            raise ValueError(self.failure) from error
        finally:
            self._spent_s += self.clock() - began
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

    def look_ahead(self, text: Sequence[int]) -> None:
        """Find out what must follow a text, so that `guess` knows it at once."""
        began = self.clock()
        try:
            self._ahead = tuple(text), self.matcher.forced(text)
        except GrammarError as error:
            self._ahead = (), ()  # what is wrong is found out, and told, when the text is judged
            self._note(error)
        self._spent_s += self.clock() - began

    def guess(self, text: Sequence[int], most: int) -> tuple[int, ...]:
        """Return what must follow a text, at most `most` tokens; nothing if that is not the text last looked at."""
        known, forced = self._ahead
        return forced[: max(0, most)] if known == tuple(text) else ()

    def take_spent_s(self) -> float:
        """Return the seconds that the grammar was waited for since the last call."""
        spent, self._spent_s = self._spent_s, 0.0
        return spent

    def _note(self, error: GrammarError) -> None:
        if isinstance(error, GrammarKilled):
            self.killed = error.digest
