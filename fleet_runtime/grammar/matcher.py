"""Matcher: where a text stands in its grammar, and so which tokens may follow."""

import threading
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fleet_runtime.grammar.errors import GrammarError, OutsideGrammar, unusable

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["GrammarMatcher"]


class GrammarMatcher:
    """A grammar, and how far a text has come in it. Callable on any thread, one text at a time.

    Every method takes the whole text, prompt left out, and moves the grammar there: forwards, or back to where the last
    text was the same. What it says depends on that text alone.

    Args:
        make: Returns the grammar at its beginning.
        vocabulary: Number of tokens.
        end_tokens: Ids that end a text. They may follow where the grammar is satisfied, and nowhere else.
    """

    def __init__(self, make: "Callable[[], LLMatcher]", *, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self._make = make
        self._vocabulary = vocabulary
        self._ends = np.array(sorted(set(end_tokens)), dtype=np.int64)
        self._native = make()
        self._tokens: list[int] = []  # that the native matcher has taken
        self._allowed: NDArray[np.int64] | None = None  # behind them
        self._moving = threading.Lock()

    def allowed(self, text: Sequence[int]) -> NDArray[np.int64]:
        """Return the ids that may follow a text: rising, at least one. Behind an end token only end tokens may.

        Raises:
            OutsideGrammar: The text itself may not be.
            GrammarError: The grammar cannot go on, or takes too long to.
        """
        with self._moving:
            if self._ended(text):
                return self._ends
            self._seek(text)
            if self._allowed is None:
                bits = np.unpackbits(np.frombuffer(self._native.compute_bitmask(), dtype=np.uint8), bitorder="little")
                self._check()
                self._allowed = np.flatnonzero(bits[: self._vocabulary])
            if not len(self._allowed):
                raise GrammarError("The grammar has come to a place that no token of the vocabulary leads on from.")
            return self._allowed

    def forced(self, text: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that must follow a text, as far as is found out without looking at every token.

        Each is the only one that `allowed` has at its place; an end token is the last if there is one.

        Raises:
            OutsideGrammar: The text itself may not be.
            GrammarError: The grammar cannot go on, or takes too long to.
        """
        with self._moving:
            if self._ended(text):
                return ()
            self._seek(text)
            run = self._native.compute_ff_tokens()
            self._check()
            found = tuple(takewhile(lambda token: token < self._vocabulary, run))
            if not found and len(self._ends) == 1 and self._native.is_stopped():
                return (int(self._ends[0]),)
            return found

    def check(self, text: Sequence[int]) -> None:
        """Check that a text is one that the grammar allows, ended or not.

        Raises:
            OutsideGrammar: It is not.
            GrammarError: The grammar cannot go on, or takes too long to.
        """
        if not self._ended(text):
            self.allowed(text)
        elif text[-1] not in self.allowed(text[:-1]):
            raise OutsideGrammar("The text ends where its grammar does not.")

    def _ended(self, text: Sequence[int]) -> bool:
        return bool(len(text)) and text[-1] in self._ends

    def _seek(self, text: Sequence[int]) -> None:
        own = self._tokens
        common = len(own)
        if list(text[:common]) != own:
            common = next(place for place, token in enumerate(own) if place >= len(text) or token != text[place])
        if common == len(own) == len(text):
            return
        self._allowed = None
        if common < len(own):
            if not self._native.rollback(len(own) - common):
                self._native, common = self._make(), 0
            del own[common:]
        new = list(text[common:])
        taken = self._native.try_consume_tokens(new) if new else 0
        own.extend(new[:taken])
        if taken < len(new):
            self._check()
            raise OutsideGrammar("The text holds a token that its grammar rules out.")

    def _check(self) -> None:
        """Raise what has gone wrong; the native matcher is then of no more use, and made anew."""
        if self._native.is_error():
            reason = self._native.get_error()
            self._native, self._allowed = self._make(), None
            self._tokens.clear()
            raise unusable(reason)
