"""Suffix index: the places of a token sequence before which it read as another one does at its end.

A place is the number of the token that followed. Each is chained under a hash of its last 2, 4 and 8 tokens, or
whatever lengths are chosen, so that a search looks at a bounded number of places, whatever the tokens are; and what was
appended last can be taken back, exactly. (A suffix tree, as in SuffixDecoding, arXiv 2411.04975, finds the same places
in several times the memory.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Final

import numpy as np
from numpy.typing import NDArray

LENGTHS: Final = (2, 4, 8)
"""Tokens that are hashed together. A single one is so nearly everywhere."""

LONGEST: Final = 16
"""Most tokens that are compared; a longer agreement says no more."""

_LOOKED_AT: Final = 16
"""Places of a chain that are compared, the latest first."""

_FIRST: Final = 256
"""Tokens for which there is room at first."""

_FEW: Final = 8
"""Places up to which they are chained one by one, which is faster then."""

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
        followers: The tokens that followed, the latest place first; at least one.
        alike: Of each, how many tokens before it are the same as at the end, at most the longest that is compared.
    """

    followers: list[int]
    alike: list[int]


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
        self._unlink(length, self._length)
        self._length = length

    def find(self, end: Sequence[int] | Ints) -> Match | None:
        """Return what followed the places before which the sequence read as `end` does; those most alike come in.

        Args:
            end: The tokens to go on from; only the last `longest` matter.
        """
        tail = [int(token) for token in end[-self._longest :]]
        whole = np.array(tail, dtype=np.int32).tobytes() if len(tail) == self._longest else None
        tail.reverse()
        slots = self._slots_of(tail)
        for number in range(len(slots) - 1, -1, -1):
            found = self._alike(number, slots[number], tail, whole)
            if found:
                return Match([self._view[place] for place, _ in found], [alike for _, alike in found])
        return None

    def _alike(self, number: int, slot: int, tail: Sequence[int], whole: bytes | None) -> list[tuple[int, int]]:
        """Return places of a chain that are as much alike as its hash wants, each with how much that is.

        Args:
            number: Of the chains.
            slot: Of the chain.
            tail: The tokens to be found before a place, the last first.
            whole: Their memory, if they are as many as are compared: in texts that repeat themselves all are alike.
        """
        size, tokens, before = self._lengths[number], self._view, self._befores[number]
        last, first, found = tail[0], tail[size - 1], []
        place = self._latests[number][slot]
        for _ in range(_LOOKED_AT):
            if place < 0:
                break
            # Other tokens may have the same hash; most are told by two of theirs.
            if tokens[place - 1] == last and tokens[place - size] == first and tokens[place] >= 0:
                alike, most = 1, min(place, len(tail))
                if whole is not None and self._bytes[4 * (place - most) : 4 * place] == whole:
                    alike = most
                while alike < most and tokens[place - 1 - alike] == tail[alike]:
                    alike += 1
                if alike >= size:
                    found.append((place, alike))
            place = before[place]
        return found

    def _make_room(self, capacity: int) -> None:
        self._tokens: Ints = np.zeros(capacity, dtype=np.int32)
        self._before = [np.full(capacity, _NONE, dtype=np.int32) for _ in self._lengths]
        self._bits = max(4, (capacity - 1).bit_length() - 1)  # half as many hashes as tokens, to as many
        self._latest = [np.full(1 << self._bits, _NONE, dtype=np.int32) for _ in self._lengths]
        # The same memory, for single numbers: they are read and written several times as fast.
        self._view: memoryview[int] = self._tokens.data
        self._bytes = self._view.cast("B")
        self._befores: list[memoryview[int]] = [each.data for each in self._before]
        self._latests: list[memoryview[int]] = [each.data for each in self._latest]

    def _link(self, first: int, last: int) -> None:
        """Chain the places from `first` to before `last`."""
        if last - first <= _FEW:
            for place in range(first, last):
                for number, slot in enumerate(self._slots_of(self._tail(place))):
                    self._befores[number][place] = self._latests[number][slot]
                    self._latests[number][slot] = place
            return
        for number, size in enumerate(self._lengths):
            begin = max(first, size)
            if begin >= last:
                continue
            latest, before = self._latest[number], self._before[number]
            slots, places = self._slots(number, begin, last), np.arange(begin, last, dtype=np.int32)
            order = np.argsort(slots, kind="stable")
            slots, places = slots[order], places[order]
            follows = slots[1:] == slots[:-1]
            previous = latest[slots]
            previous[1:][follows] = places[:-1][follows]
            before[places] = previous
            latest[slots] = places  # assigned in order: the latest comes last

    def _unlink(self, first: int, last: int) -> None:
        """Take the places from `first` to before `last`, which is the end, out of their chains."""
        if last - first <= _FEW:
            for place in range(last - 1, first - 1, -1):
                for number, slot in enumerate(self._slots_of(self._tail(place))):
                    self._latests[number][slot] = self._befores[number][place]
            return
        for number, size in enumerate(self._lengths):
            begin = max(first, size)
            if begin < last:
                slots, latest, before = self._slots(number, begin, last), self._latest[number], self._before[number]
                # Of the places under one hash, the earliest that goes says what the latest was before it.
                latest[slots[::-1]] = before[begin:last][::-1]  # assigned in order: that comes last

    def _tail(self, place: int) -> list[int]:
        """Return the tokens before a place that are hashed, the last first."""
        tail = self._view[max(0, place - self._lengths[-1]) : place].tolist()
        tail.reverse()
        return tail

    def _slots_of(self, tail: Sequence[int]) -> list[int]:
        """Return the hashes of the last tokens, for as many lengths as there are tokens for.

        Args:
            tail: The tokens, the last first.
        """
        products = [*accumulate(map(mul, tail, self._plain_weights))]
        shift = 64 - self._bits
        return [(products[size - 1] & _WORD) >> shift for size in self._lengths if size <= len(products)]

    def _slots(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the hashes of the tokens before the places from `first` to before `last`."""
        size = self._lengths[number]
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens[first - size : last - 1], size)
        products = windows[:, ::-1].astype(np.int64).view(np.uint64) * self._weights[:size]
        mixed = products.sum(axis=1, dtype=np.uint64)
        hashes: NDArray[np.int64] = (mixed >> np.uint64(64 - self._bits)).astype(np.int64)
        return hashes
