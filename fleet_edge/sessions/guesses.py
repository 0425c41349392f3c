"""Guesses: what is likely to follow in a text that the edge writes by itself, from what prompt and text have shown.

Where a text repeats itself or its prompt, what followed the same tokens before is likely to follow again (prompt
lookup; Saxena, 2023). A guess is computed in the same step as the token before it, and kept if it is the token that
would be written there anyway, so that the text does not depend on it.

A session takes a bounded amount of memory, and a guess a bounded number of comparisons, whatever its tokens are.
"""

from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Final

MAX_GUESS: Final = 16
"""Tokens: most that are guessed at once."""

_WINDOW: Final = 4096
"""Tokens, the latest, among which is searched; a power of two."""

_SHORTEST: Final = 2
_LONGEST: Final = 8
"""Tokens that must be alike before a place: a single one is so nearly everywhere; more than the most say no more."""

_LOOKED_AT: Final = 8
"""Places, the latest first, that are compared."""

_PRIOR: Final = 0.5
_PRIOR_TOKENS: Final = 2.0
_REMEMBERED: Final = 16
"""Guesses, about, by which it is judged how often they are right."""


def _places() -> "array[int]":
    return array("i", [-1]) * _WINDOW


@dataclass(slots=True)
class Guesses:
    """What one session's text lets expect, and how often that was right."""

    _seen: int = 0  # tokens that can be found
    _latest: "array[int]" = field(default_factory=_places)  # by a hash of some tokens, where their latest follower is
    _before: "array[int]" = field(default_factory=_places)  # by such a place, the one before it of the same hash
    _guessed: tuple[int, ...] = ()
    _guessed_at: int = 0
    _tested: float = _PRIOR_TOKENS
    _right: float = _PRIOR * _PRIOR_TOKENS

    @property
    def rate(self) -> float:
        """How likely a guess is right, the guesses before it taken as right."""
        return self._right / self._tested

    def next(self, tokens: Sequence[int], *, ends: Container[int] = ()) -> tuple[int, ...]:
        """Return what is likely to follow, at most `MAX_GUESS` tokens; nothing where nothing is alike.

        Args:
            tokens: Prompt and text: those of the last call, and what they have grown by.
            ends: Ids that end a text; none of them is guessed, since nothing follows them.
        """
        self._learn(tokens)
        self._note(tokens)
        place = self._likeliest(tokens)
        guess: list[int] = []
        while place and len(guess) < MAX_GUESS:
            # What is guessed may go on from itself, where the text goes round.
            at = place + len(guess)
            token = tokens[at] if at < len(tokens) else guess[at - len(tokens)]
            if token in ends:
                break
            guess.append(token)
        self._guessed, self._guessed_at = tuple(guess), len(tokens)
        return self._guessed

    def _learn(self, tokens: Sequence[int]) -> None:
        """Count which of the last guesses were right, whether they were used or not."""
        for place, guess in enumerate(self._guessed, start=self._guessed_at):
            if place >= len(tokens):
                return
            kept = 1.0 - 1.0 / _REMEMBERED
            right = tokens[place] == guess
            self._tested = kept * self._tested + 1.0
            self._right = kept * self._right + right
            if not right:
                return

    def _note(self, tokens: Sequence[int]) -> None:
        """Let those tokens be found that are new."""
        for place in range(max(self._seen, len(tokens) - _WINDOW, _SHORTEST), len(tokens)):
            slot = _slot(tokens, place)
            self._before[place % _WINDOW] = self._latest[slot]
            self._latest[slot] = place
        self._seen = len(tokens)

    def _likeliest(self, tokens: Sequence[int]) -> int:
        """Return the place of what followed the longest, then the latest, tokens that were like the last ones; or 0."""
        if len(tokens) < _SHORTEST:
            return 0
        best, found = _SHORTEST - 1, 0
        place = self._latest[_slot(tokens, len(tokens))]
        for _ in range(_LOOKED_AT):
            if place < max(1, len(tokens) - _WINDOW):
                break  # too long ago: the memory of it holds another place by now
            alike = _alike(tokens, place)
            if alike > best:
                best, found = alike, place
            if best == _LONGEST:
                break
            place = self._before[place % _WINDOW]
        return found


def _slot(tokens: Sequence[int], place: int) -> int:
    return (tokens[place - 2] * 2654435761 + tokens[place - 1] * 40503) % 4294967296 >> 20


def _alike(tokens: Sequence[int], place: int) -> int:
    """Return how many tokens before a place are those at the end."""
    count, most = 0, min(place, _LONGEST)
    while count < most and tokens[place - 1 - count] == tokens[-1 - count]:
        count += 1
    return count
