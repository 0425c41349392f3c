"""Matcher: where a generation is in its grammar, and so which tokens may follow."""

import threading
import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.errors import GrammarError, OutsideGrammar
from fleet_common.grammar.process import CompiledGrammar


class GrammarMatcher:
    """A grammar, and how far a generation has come in it. Callable on any thread, one text at a time.

    Every method takes the whole text, prompt left out, and moves the grammar there: forwards, or back to where the last
    text was the same. What it returns depends on that text alone.

    Args:
        compiled: The grammar.
    """

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._compiled = compiled
        self._ends = np.array(sorted(set(compiled.end_tokens)), dtype=np.int64)
        self._number = compiled.new_matcher()
        self._tokens: list[int] = []  # that the grammar's process has taken
        self._allowed: NDArray[np.int64] | None = compiled.first_allowed  # behind them
        self._moving = threading.Lock()
        weakref.finalize(self, compiled.drop, self._number)

    def allowed(self, text: Sequence[int]) -> NDArray[np.int64]:
        """Return the ids that may follow a text: rising, at least one. Behind an end token only end tokens may.

        Raises:
            OutsideGrammar: The text itself may not be.
            GrammarError: The grammar cannot go on, or takes too long to.
        """
        with self._moving:
            if self._ended(text):
                return self._ends
            if not len(text):
                found = self._compiled.first_allowed
            elif self._allowed is not None and list(text) == self._tokens:
                found = self._allowed
            else:
                keep = self._keep(text)
                try:
                    found = self._compiled.allowed(self._number, keep, text[keep:])
                except GrammarError as error:
                    self._failed(text, error)
                    raise
                self._tokens[keep:] = text[keep:]
                self._allowed = found
            if not len(found):
                raise GrammarError("The grammar has come to a place that no token of the vocabulary leads on from.")
            return found

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
            if not len(text):
                return self._compiled.first_forced
            keep = self._keep(text)
            try:
                found = self._compiled.forced(self._number, keep, text[keep:])
            except GrammarError as error:
                self._failed(text, error)
                raise
            if keep < len(self._tokens) or keep < len(text):
                self._tokens[keep:], self._allowed = text[keep:], None
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

    def _keep(self, text: Sequence[int]) -> int:
        """Return how many tokens of the last text begin this one too."""
        own = self._tokens
        if list(text[: len(own)]) == own:
            return len(own)
        return next(place for place, token in enumerate(own) if place >= len(text) or token != text[place])

    def _failed(self, text: Sequence[int], error: GrammarError) -> None:
        """Note where the grammar's process is after an error: at the beginning, or before the token it ruled out."""
        self._allowed = None
        self._tokens = list(text[: error.taken]) if isinstance(error, OutsideGrammar) else []
