"""N-gram speculation: likely next tokens in edge-only decoding, looked up in prompt and generation.

Where a sequence repeats, what followed the same tokens before is likely to follow again (prompt lookup; Saxena, 2023).
A speculated token is computed in the same step as the token before it, and kept only if it is the token that would be
generated anyway, so the output does not depend on it. Memory per session and comparisons per lookup are bounded.
"""

from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Final

MAX_SPECULATED: Final = 16
"""Most tokens speculated at once."""

_WINDOW: Final = 4096
"""Latest tokens that are searched; a power of two."""

_SHORTEST: Final = 2
_LONGEST: Final = 8
"""Tokens that must match: a single one matches nearly everywhere; more than the most add no information."""

_MOST_MATCHES: Final = 8
"""Matches compared, the latest first."""

_PRIOR: Final = 0.5
_PRIOR_TOKENS: Final = 2.0
_REMEMBERED: Final = 16
"""Number of speculated tokens, about, over which the acceptance rate is averaged."""


def _places() -> "array[int]":
    return array("i", [-1]) * _WINDOW


@dataclass(slots=True)
class NgramSpeculation:
    """Index of one session's n-grams, and the acceptance rate of what it has speculated."""

    _seen: int = 0  # indexed tokens
    _latest: "array[int]" = field(default_factory=_places)  # hash of two tokens -> latest position after them
    _before: "array[int]" = field(default_factory=_places)  # position -> the one before it with the same hash
    _speculated: tuple[int, ...] = ()
    _speculated_at: int = 0
    _tested: float = _PRIOR_TOKENS
    _right: float = _PRIOR * _PRIOR_TOKENS

    @property
    def rate(self) -> float:
        """Probability that a speculated token is right, given that those before it are."""
        return self._right / self._tested

    def next(self, tokens: Sequence[int], *, ends: Container[int] = ()) -> tuple[int, ...]:
        """Return likely next tokens, at most `MAX_SPECULATED`; empty without a match.

        `tokens` is prompt and generation, and must extend those of the last call; `ends`, ids that end a generation,
        are never speculated.
        """
        self._learn(tokens)
        self._index(tokens)
        place = self._likeliest(tokens)
        speculated: list[int] = []
        while place and len(speculated) < MAX_SPECULATED:
            # A match that reaches the end continues with what it has speculated.
            at = place + len(speculated)
            token = tokens[at] if at < len(tokens) else speculated[at - len(tokens)]
            if token in ends:
                break
            speculated.append(token)
        self._speculated, self._speculated_at = tuple(speculated), len(tokens)
        return self._speculated

    def _learn(self, tokens: Sequence[int]) -> None:
        """Count which of the last speculated tokens were right, whether they were used or not."""
        for place, token in enumerate(self._speculated, start=self._speculated_at):
            if place >= len(tokens):
                return
            kept = 1.0 - 1.0 / _REMEMBERED
            right = tokens[place] == token
            self._tested = kept * self._tested + 1.0
            self._right = kept * self._right + right
            if not right:
                return

    def _index(self, tokens: Sequence[int]) -> None:
        for place in range(max(self._seen, len(tokens) - _WINDOW, _SHORTEST), len(tokens)):
            slot = _slot(tokens, place)
            self._before[place % _WINDOW] = self._latest[slot]
            self._latest[slot] = place
        self._seen = len(tokens)

    def _likeliest(self, tokens: Sequence[int]) -> int:
        """Return the position after the longest, then latest, match of the last tokens; 0 without one."""
        if len(tokens) < _SHORTEST:
            return 0
        best, found = _SHORTEST - 1, 0
        place = self._latest[_slot(tokens, len(tokens))]
        for _ in range(_MOST_MATCHES):
            if place < max(1, len(tokens) - _WINDOW):
                break  # overwritten since
            length = _match_length(tokens, place)
            if length > best:
                best, found = length, place
            if best == _LONGEST:
                break
            place = self._before[place % _WINDOW]
        return found


def _slot(tokens: Sequence[int], place: int) -> int:
    return (tokens[place - 2] * 2654435761 + tokens[place - 1] * 40503) % 4294967296 >> 20


def _match_length(tokens: Sequence[int], place: int) -> int:
    """Return how many tokens before a position equal the last ones."""
    count, most = 0, min(place, _LONGEST)
    while count < most and tokens[place - 1 - count] == tokens[-1 - count]:
        count += 1
    return count
