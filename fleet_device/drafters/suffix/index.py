"""Suffix index: the places of a token sequence before which it read as another one does at its end.

A place is the number of the token that followed. Each is chained under a hash of its last 2, 4 and 8 tokens, or
whatever lengths are chosen, so that a search looks at a bounded number of places, whatever the tokens are; and what was
appended last can be taken back, exactly. (A suffix tree, as in SuffixDecoding, arXiv 2411.04975, finds the same places
in several times the memory.)
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["LONGEST", "Match", "SuffixIndex", "token_bytes"]

LENGTHS: Final = (2, 4, 8)
"""Tokens that are hashed together. A single one is so nearly everywhere."""

LONGEST: Final = 16
"""Most tokens that are compared; a longer agreement says no more."""

_LOOKED_AT: Final = 24
"""Places of a chain that are compared, the latest first."""

_FIRST: Final = 256
"""Tokens for which there is room at first."""

_NONE: Final = -1
_WORD: Final = (1 << 64) - 1

Ints = NDArray[np.int32]


def token_bytes(lengths: int = len(LENGTHS)) -> int:
    """Return the bytes that an index takes at most for each token that it has room for."""
    return 4 + 2 * 4 * lengths


@dataclass(frozen=True, slots=True)
class Match:
    """What followed where the sequence read as it does at its end.

    Attributes:
        followers: int32 `[places]`, the tokens that followed, the latest place first.
        alike: int64 `[places]`, how many tokens before each are the same as at the end, at most `LONGEST`.
    """

    followers: Ints
    alike: NDArray[np.int64]


class SuffixIndex:
    """A token sequence that can be searched. Not for use from several threads at once.

    Args:
        lengths: Tokens that are hashed together, rising; the first is the fewest that a match has.
        longest: Most tokens that are compared; at least the last of `lengths`.
        capacity: Most tokens, for which room is made at once; None for one that grows.
    """

    def __init__(
        self, *, lengths: Sequence[int] = LENGTHS, longest: int = LONGEST, capacity: int | None = None
    ) -> None:
        self._lengths = tuple(lengths)
        self._longest = longest
        random = np.random.default_rng(20241104)
        self._weights = random.integers(1 << 62, size=self._lengths[-1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._plain_weights = self._weights.tolist()
        self._length = 0
        self._make_room(capacity or _FIRST)

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> Ints:
        """The sequence, int32 `[length]`; valid until the next change."""
        return self._tokens[: self._length]

    @property
    def room(self) -> int:
        """Tokens for which there is room before all of it is hashed anew."""
        return len(self._tokens) - self._length

    def clear(self) -> None:
        """Forget all."""
        self._length = 0
        for latest in self._latest:
            latest.fill(_NONE)

    def append(self, tokens: Sequence[int] | Ints) -> None:
        """Append tokens; those below 0 stand between texts, and nothing is found across them."""
        if len(tokens) == 0:
            return
        needed = self._length + len(tokens)
        if needed > len(self._tokens):
            before = self.tokens
            self._make_room(max(needed, 2 * len(self._tokens)))
            self._tokens[: self._length] = before
            self._link(0, self._length)
        self._tokens[self._length : needed] = tokens
        first, self._length = self._length, needed
        self._link(first, needed)

    def truncate(self, length: int) -> None:
        """Take back all tokens from `length` on."""
        length = max(length, 0)
        if length >= self._length:
            return
        for number, size in enumerate(self._lengths):
            first = max(length, size)
            if first < self._length:
                slots, latest, before = self._slots(number, first, self._length), self._latest[number], self._before
                # Of the places under one hash, the earliest that goes says what the latest was before it.
                latest[slots[::-1]] = before[number][first : self._length][::-1]  # assigned in order: that comes last
        self._length = length

    def find(self, end: Sequence[int] | Ints) -> Match | None:
        """Return what followed the places before which the sequence read as `end` does; those most alike come in.

        Args:
            end: The tokens to go on from; only the last `longest` matter.
        """
        tail = np.asarray(end[-self._longest :], dtype=np.int32)
        for number in range(len(self._lengths) - 1, -1, -1):
            size = self._lengths[number]
            if len(tail) < size:
                continue
            slot = self._slot(tail[len(tail) - size :])
            places = self._chain(number, slot)
            if not len(places):
                continue
            alike = self._alike(places, tail)
            enough = alike >= size
            if enough.any():
                return Match(self._tokens[places[enough]], alike[enough])
        return None

    def _chain(self, number: int, slot: int) -> NDArray[np.int64]:
        places: list[int] = []
        place, before = int(self._latest[number][slot]), self._before[number]
        while place >= 0 and len(places) < _LOOKED_AT:
            places.append(place)
            place = int(before[place])
        found = np.array(places, dtype=np.int64)
        return found[self._tokens[found] >= 0] if places else found

    def _alike(self, places: NDArray[np.int64], tail: Ints) -> NDArray[np.int64]:
        back = np.arange(1, len(tail) + 1)
        at = places[:, None] - back  # [places, tokens]
        same = (self._tokens[np.maximum(at, 0)] == tail[::-1]) & (at >= 0)
        count: NDArray[np.int64] = np.cumprod(same, axis=1).sum(axis=1)
        return count

    def _make_room(self, capacity: int) -> None:
        self._tokens: Ints = np.zeros(capacity, dtype=np.int32)
        self._before = [np.full(capacity, _NONE, dtype=np.int32) for _ in self._lengths]
        self._bits = max(4, (capacity - 1).bit_length() - 1)  # half as many hashes as tokens, to as many
        self._latest = [np.full(1 << self._bits, _NONE, dtype=np.int32) for _ in self._lengths]

    def _link(self, first: int, last: int) -> None:
        """Chain the places from `first` to before `last`."""
        for number, size in enumerate(self._lengths):
            begin = max(first, size)
            if begin >= last:
                continue
            latest, before = self._latest[number], self._before[number]
            if last - begin == 1:  # as fast as can be: this is what happens at each token
                slot = self._slot(self._tokens[begin - size : begin])
                before[begin], latest[slot] = latest[slot], begin
                continue
            slots, places = self._slots(number, begin, last), np.arange(begin, last, dtype=np.int32)
            order = np.argsort(slots, kind="stable")
            slots, places = slots[order], places[order]
            follows = slots[1:] == slots[:-1]
            previous = latest[slots]
            previous[1:][follows] = places[:-1][follows]
            before[places] = previous
            latest[slots] = places  # assigned in order: the latest comes last

    def _slots(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the hashes of the tokens before the places from `first` to before `last`."""
        size = self._lengths[number]
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens[first - size : last - 1], size)
        return self._hash(number, windows)

    def _slot(self, window: Ints) -> int:
        """Return the hash of some tokens."""
        mixed = sum(map(operator.mul, window.tolist(), self._plain_weights)) & _WORD
        return int(mixed >> (64 - self._bits))

    def _hash(self, number: int, windows: Ints) -> NDArray[np.int64]:
        size = self._lengths[number]
        products = windows.astype(np.int64).view(np.uint64) * self._weights[:size]
        mixed = products.sum(axis=1, dtype=np.uint64)
        hashes: NDArray[np.int64] = (mixed >> np.uint64(64 - self._bits)).astype(np.int64)
        return hashes
